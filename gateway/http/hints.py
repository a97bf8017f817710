"""Hints about KV that other servers' clients send along (`kv_hints`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weft.runtime.errors import RequestError

_KEEP = ("retain", "pin", "keep")
_DROP = ("release", "evict", "demote", "unpin")


def lease_of(hints: Mapping[str, Any] | None) -> float | None:
    """Seconds for which to lease a conversation's KV behind this turn; None if they do not say.

    Of `actions`, those that keep or drop it are heeded, the last one counts; others are for tiers that are not
    here.
    """
    seconds: float | None = None
    actions = (hints or {}).get("actions") or []
    if not isinstance(actions, list):
        raise RequestError("kv_hints.actions", type(actions).__name__, "must be a list")
    for i, action in enumerate(actions):
        if not isinstance(action, dict):
            raise RequestError(f"kv_hints.actions[{i}]", type(action).__name__, "must be an object")
        kind = str(action.get("type") or action.get("action") or "").lower()
        if kind.startswith(_DROP):
            seconds = 0.0
        elif kind.startswith(_KEEP):
            ttl = action.get("ttl_seconds", action.get("ttl"))
            if ttl is not None and not (type(ttl) in (int, float) and 0 <= ttl < math.inf):
                raise RequestError(f"kv_hints.actions[{i}].ttl", ttl, "must be a number of seconds")
            seconds = None if ttl is None else min(float(ttl), 3600.0)
    return seconds
