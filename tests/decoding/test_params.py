"""Every impossible sampling parameter is refused, naming field and value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from weft.runtime.decoding.params import MAX_TOP_LOGPROBS, SamplingParams
from weft.runtime.errors import RequestError

NAN, INF = math.nan, math.inf

REFUSED: dict[str, list[Any]] = {
    "max_tokens": [-1],
    "min_tokens": [-1, 129],  # max_tokens is 128
    "temperature": [-0.1, NAN, INF],
    "top_p": [0.0, -0.5, 1.0001, NAN],
    "top_k": [0, -2],
    "min_p": [-0.1, 1.1, NAN],
    "frequency_penalty": [-2.1, 2.1, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN, INF],
    "repetition_penalty": [0.0, -1.0, 10.1, NAN],
    "logit_bias": [{-1: 1.0}, {5: 101.0}, {5: -100.1}, {5: NAN}],
    "logprobs": [-1, MAX_TOP_LOGPROBS + 1],
    "stop": [("",), ("a", "")],
    "stop_regex": [("",), ("a", "")],
}
ALLOWED: dict[str, list[Any]] = {
    "max_tokens": [0, 1, 10**9],
    "min_tokens": [0, 128],
    "temperature": [0.0, 1.0, 100.0],
    "top_p": [1e-9, 1.0],
    "top_k": [-1, 1, 10**6],
    "min_p": [0.0, 1.0],
    "frequency_penalty": [-2.0, 2.0],
    "presence_penalty": [-2.0, 2.0],
    "repetition_penalty": [0.1, 1.0, 10.0],
    "logit_bias": [{}, {0: 100.0, 5: -100.0}],
    "seed": [None, 0, -1, 2**63 - 1],
    "logprobs": [None, 0, MAX_TOP_LOGPROBS],
    "stop": [(), ("a", "b")],
    "stop_token_ids": [(), (0, 5)],
    "stop_regex": [(), ("a+",)],
}


MISTYPED: dict[str, list[Any]] = {
    "max_tokens": [4.0, "4", None, True, 2**63],
    "min_tokens": ["0", None],
    "temperature": ["1", None],
    "top_p": ["1"],
    "top_k": [1.5, 2**63],
    "min_p": [None],
    "frequency_penalty": ["0"],
    "presence_penalty": [None],
    "repetition_penalty": ["1"],
    "logit_bias": [[5], {"5": 1.0}, {5: "1"}, None],
    "seed": [1.5, "1", 2**64],
    "logprobs": [1.5, True, "1"],
    "stop": ["abc", None, (1,)],
    "stop_token_ids": [5, ("5",), (1.5,)],
    "stop_regex": ["abc", None, (1,)],
    "ignore_eos": [None, "yes"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_refused_with_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value}).validate()
    assert (caught.value.field, repr(caught.value.value)) == (field, repr(value))
    assert str(caught.value) == f"{field} = {value!r}: {caught.value.reason}"


@pytest.mark.parametrize(("field", "value"), cases(MISTYPED))
def test_a_wrong_type_or_an_integer_beyond_64_bits_is_refused(field: str, value: Any) -> None:
    """Whatever else a tensor or a message would meet it with, it would meet it in the engine's core."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value}).validate()
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize(("field", "value"), cases(ALLOWED))
def test_limits_are_allowed(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    assert params.validate() is params


def test_defaults_are_valid() -> None:
    SamplingParams().validate()
