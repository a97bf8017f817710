"""What a caller got wrong is its own error, by name, and nobody else's."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from support.engine import byte_tokenizer, drawn_again, finish, running, small_config, some_tokens
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.errors import CheckpointError, RequestError
from weft.runtime.model.model import Model

PROMPT = some_tokens(20, seed=7)
PARAMS = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)

REFUSED: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("min_tokens", 5),  # of max_tokens 4
    ("temperature", -1.0),
    ("temperature", "1"),
    ("top_p", 0.0),
    ("top_k", 0),
    ("top_k", 10**30),
    ("min_p", 2.0),
    ("frequency_penalty", 3.0),
    ("presence_penalty", -3.0),
    ("repetition_penalty", 0.0),
    ("logit_bias", {5: 101.0}),
    ("logit_bias", {byte_tokenizer().size: 1.0}),
    ("logit_bias", {1 << 70: 1.0}),
    ("seed", 1.5),
    ("seed", 2**64),
    ("logprobs", 65),
    ("stop", ("",)),
    ("stop", "abc"),
    ("stop", ("\ud800",)),
    ("stop_token_ids", (byte_tokenizer().size,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (10**30,)),
    ("stop_regex", ("(",)),
    ("stop_regex", ("\ud800",)),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{field}-{i}" for i, (field, _) in enumerate(REFUSED)])
def test_an_impossible_parameter_fails_its_own_call_only(field: str, value: Any) -> None:
    params = SamplingParams(**({"max_tokens": 4, "seed": 1} | {field: value}))

    async def work(engine: Engine) -> None:
        bystander = asyncio.ensure_future(engine.generate(PROMPT, PARAMS))
        with engine.open(PROMPT) as sequence:
            with pytest.raises(RequestError) as caught:
                await sequence.complete(params)
            assert caught.value.field == field
            # The sequence is as good as before.
            output = (await sequence.complete(PARAMS)).tokens
        assert output == (await bystander).tokens == drawn_again(PROMPT, output, PARAMS)

    with running() as engine:
        finish(work(engine))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    """Divided by it, logits would overflow."""
    with running() as engine:
        cold = finish(engine.generate(PROMPT, SamplingParams(max_tokens=12, temperature=temperature, top_p=0.9)))
        greedy = finish(engine.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0)))
    assert cold.tokens == greedy.tokens


def test_text_that_is_not_unicode_is_refused() -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(RequestError, match="text"):
            engine.open("a\ud800")
        with engine.open(PROMPT) as sequence, pytest.raises(RequestError, match="text"):
            sequence.extend("\ud800")

    with running() as engine:
        finish(work(engine))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    """Encoding text could give ids that the model has no row for."""
    config = dataclasses.replace(small_config(4, 128), vocab_size=200)
    model = Model(config, dummy_weights(config, seed=1))
    with pytest.raises(CheckpointError, match=r"265.*200"), running(model, leaks=True):
        pass


@pytest.mark.parametrize("wrong", [1.5, "1", True, None, 1 << 70])
def test_an_argument_of_another_type_never_reaches_the_core(wrong: Any) -> None:
    async def work(engine: Engine) -> None:
        bystander = asyncio.ensure_future(engine.generate(PROMPT, PARAMS))
        with engine.open(PROMPT) as sequence:
            with pytest.raises(RequestError, match="top"):
                await sequence.append_scored([5, 6], wrong)
            with pytest.raises(RequestError, match="length"):
                await sequence.truncate(wrong)
        assert len((await bystander).tokens) == 12

    with running() as engine:
        finish(work(engine))
