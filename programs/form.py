"""Guided form filling: one field after another, each held to a form of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sglang as sgl


@sgl.function
def form(s: Any, document: str, fields: Mapping[str, Mapping[str, Any]], ask: str = "What is the {}?") -> None:
    """Read `document` once and fill in `fields`: what each is called, and what `sgl.gen` is told of it.

    A field may have a `regex`, a `dtype` such as int, `choices`, or nothing but `max_tokens`. ask: how a field is
    asked for. Sets each field, and `filled`, all of them. One generation or choice a field, in order, so that
    each sees those before it.
    """
    s += sgl.user(document)
    for field, held in fields.items():
        drawn = sgl.gen(field, **held) if "choices" in held else sgl.gen(field, temperature=0, **held)
        s += sgl.user(ask.format(field)) + sgl.assistant(drawn)
    s.set_var("filled", {field: s[field].strip() for field in fields})
