"""Random schemas, prompts and depths: every run ends, and every output that ends validates."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.engine import finish, running, some_tokens
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.engine.pace import Pace

NAMES = st.text('abcxyz_ é\u2192"\\', min_size=1, max_size=5)


def numbers(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.integers(-50, 50)
    return st.builds(
        lambda low, size, exclusive: {
            "type": kind,
            ("exclusiveMinimum" if exclusive else "minimum"): low,
            "maximum": low + size,
        },
        bounds,
        st.integers(1, 60),
        st.booleans(),
    )


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def made(properties: dict[str, Any], required: int, more: bool) -> dict[str, Any]:
        names = list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names[: required % (len(names) + 1)],
            "additionalProperties": {"type": "null"} if more else False,
        }

    return st.builds(made, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4), st.booleans())


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    numbers("integer"),
    numbers("number"),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, *[st.integers(0, 5)] * 2),
    st.sampled_from([r"^[a-f]{1,4}$", r"^\d+-\d+$", "^(x|yy)*$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(NAMES | st.integers(-9, 9) | st.booleans(), min_size=1, max_size=4).map(lambda v: {"enum": v}),
    NAMES.map(lambda v: {"const": v}),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda item, low, size: {"type": "array", "items": item, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of}),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_what_ends_validates(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "drafts", lambda self, most, cost: most)
    ended = 0

    with running(drafts=0, context=600) as plain, running(drafts=3, context=600) as drafting:

        @settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
        @given(schema=SCHEMAS, length=st.integers(1, 60), seed=st.integers(0, 1 << 20))
        def check(schema: dict[str, Any], length: int, seed: int) -> None:
            nonlocal ended
            grammar = Grammar("json_schema", json.dumps(schema))
            params = SamplingParams(max_tokens=160, seed=seed, temperature=1.1, grammar=grammar)
            prompt = some_tokens(length, seed % 50)
            output = finish(drafting.generate(prompt, params))
            assert output.tokens == finish(plain.generate(prompt, params)).tokens
            if output.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(output.text), schema)
            else:
                assert output.finish_reason == "length" and len(output.tokens) == 160

        check()
    assert ended > 0.8 * examples
