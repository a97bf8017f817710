"""A record out of a text, held to a JSON schema and checked against the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sglang as sgl

from weft.backend.executor import Attempts


@sgl.function
def json_extraction(
    s: Any,
    document: str,
    schema: Mapping[str, Any],
    question: str = "What is the {}?",
    check: Callable[[str, Any], None] | None = None,
    most: int = 4,
) -> None:
    """Draw each property of an object's `schema` as JSON, held to the property's own schema, and check it.

    question: how to ask for a property. check: raises an exception for a property and value that will not do; by
    default, for values that the document does not say. Such a value is drawn again, `most` times in all.
    Sets `found`, the object. One generation for a property and attempt, the properties side by side.
    Needs the executor: `s.gather` and `s.attempt`, which raise `ProgramError` in the end.
    """

    def said(name: str, value: Any) -> None:
        if str(value) not in document:
            raise ValueError(f"the document does not say {value}")

    s += sgl.user_begin() + document + "\n"
    fields = schema["properties"]
    drawn = [
        partial(_draw, name, kind, question.format(name), check or said, Attempts(most))
        for name, kind in fields.items()
    ]
    branches = s.gather(*drawn)
    s.set_var("found", {name: branch.value for name, branch in zip(fields, branches, strict=True)})


def _draw(
    name: str, kind: Any, question: str, check: Callable[[str, Any], None], attempts: Attempts, s: Any
) -> Any:
    """The value of one property."""
    s += question + sgl.user_end()
    value = sgl.gen(name, max_tokens=64, temperature=0, json_schema=json.dumps(kind))
    s.attempt(sgl.assistant(value), lambda trial: check(name, json.loads(trial[name])), attempts)
    return json.loads(s[name])
