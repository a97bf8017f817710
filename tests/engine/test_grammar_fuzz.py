"""Random schemas, prompts and depths: every run ends, and every output that ends validates."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.engine import draft_always, finish, running, some_tokens
from support.schemas import SCHEMAS
from weft.runtime.decoding.params import Grammar, SamplingParams


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_what_ends_validates(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    ended = 0

    with ExitStack() as stack:
        engines = {depth: stack.enter_context(running(drafts=depth, context=600)) for depth in (0, 1, 2, 4)}

        @settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
        @given(SCHEMAS, st.integers(1, 60), st.integers(0, 1 << 20), st.sampled_from([1, 2, 4]))
        def check(schema: dict[str, Any], length: int, seed: int, depth: int) -> None:
            nonlocal ended
            grammar = Grammar("json_schema", json.dumps(schema))
            params = SamplingParams(max_tokens=160, seed=seed, temperature=1.1, grammar=grammar)
            prompt = some_tokens(length, seed % 50)
            output = finish(engines[depth].generate(prompt, params))
            assert output.tokens == finish(engines[0].generate(prompt, params)).tokens
            if output.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(output.text), schema)
            else:
                assert output.finish_reason == "length" and len(output.tokens) == 160

        check()
    assert ended > 0.8 * examples
