"""Fields of a record, one question a turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def extraction(s: Any, record: dict[str, Any], fields: Sequence[str]) -> None:
    """Read `record` once and ask for each of `fields` in a turn of its own. Sets each field, as text, and
    `found`, all of them. One generation a field; a turn computes nothing of those before it."""
    s += sgl.system("Answer with the value only.")
    for i, field in enumerate(fields):
        ask = f"What is the {field}?"
        s += sgl.user(f"Here is a record:\n{json.dumps(record)}\n{ask}" if i == 0 else ask)
        s += sgl.assistant(sgl.gen(field, max_tokens=32, temperature=0))
    s.set_var("found", {field: s[field].strip() for field in fields})
