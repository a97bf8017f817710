"""JSON schemas as grammars: nothing invalid is accepted, and what is valid is, or its schema is refused by name.

Judged by JSON-Schema-Test-Suite, and by jsonschema on random schemas and values. A value counts as accepted if one
of its spellings is: the grammar has properties in the schema's order, and writes 1 for 1.0.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.schemas import SCHEMAS, changed, fitting, spellings
from support.tree import ROOT
from weft.runtime.decoding.grammar import Grammars
from weft.runtime.decoding.params import Grammar
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import byte_tokenizer

SUITE = json.loads((ROOT / "tests/data/json_schema_test_suite/draft2020-12.json").read_text())
# `format` is held to here, where the draft has it as an annotation only: who asks for a date means a date.
ASSERTED = "is only an annotation by default"


@cache
def grammars() -> Grammars:
    return Grammars(byte_tokenizer())


def compiled(schema: Any) -> Any:
    return grammars()._compile(Grammar("json_schema", json.dumps(schema)))


def accepts(matcher: Any, value: Any) -> bool:
    return any(takes(matcher, text) for text in spellings(value))


def takes(matcher: Any, text: str) -> bool:
    own, tokens = matcher.deep_copy(), byte_tokenizer().encode_plain(text)
    return bool(own.try_consume_tokens(tokens) == len(tokens) and own.is_accepting())


def words(schema: Any) -> set[str]:
    """Keywords and other strings in a schema."""
    return set(re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(schema)))


@pytest.mark.parametrize("name", SUITE)
def test_suite(name: str) -> None:
    for group in SUITE[name]:
        try:
            matcher = compiled(group["schema"])
        except RequestError as refused:
            named = [word for word in words(group["schema"]) if word and word in refused.reason]
            assert named or refused.reason.startswith(("Unsatisfiable", "Unimplemented keys", "cannot hold to")), (
                group["description"],
                refused.reason,
            )
            continue
        for test in group["tests"]:
            want = test["valid"] and ASSERTED not in test["description"]
            assert accepts(matcher, test["data"]) == want, (group["description"], test["description"])


def test_most_of_the_suite_is_held_to() -> None:
    """How much is refused does not grow unseen."""
    done: Counter[bool] = Counter()
    for group in (group for groups in SUITE.values() for group in groups):
        try:
            compiled(group["schema"])
            done[True] += len(group["tests"])
        except RequestError:
            done[False] += len(group["tests"])
    assert done[True] > 550 and sum(done.values()) == 1257, done


def test_random_schemas() -> None:
    judged: Counter[bool] = Counter()

    @settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
    @given(schema=SCHEMAS, data=st.data())
    def check(schema: Any, data: st.DataObject) -> None:
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        matcher = compiled(schema)
        value = data.draw(fitting(schema))
        for _ in range(6):
            valid = checker.is_valid(value)
            assert accepts(matcher, value) == valid, value
            judged[valid] += 1
            value = data.draw(changed(value))

    check()
    assert judged[True] > 300 and judged[False] > 300, judged
