"""Scores are the model's own log-probabilities, however the tokens were run."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from support.engine import VOCABULARY, Gate, byte_tokenizer, drawn_again, finish, running, small_model, some_tokens
from support.run import run
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError

PROMPT = some_tokens(130, seed=3)
CONTINUATIONS = [some_tokens(length, seed=length) for length in (1, 2, 40, 70)]


def table(tokens: list[int]) -> Tensor:
    """Row i: log-probabilities of token i, given those before it (row 0 is not used)."""
    return torch.log_softmax(torch.cat((torch.zeros(1, VOCABULARY), run(small_model(), tokens)[:-1])), dim=-1)


def assert_scored(found: list[m.Logprob], tokens: list[int], first: int, top: int = 0) -> None:
    """`found` are the scores of tokens[first:]."""
    assert [entry.token for entry in found] == tokens[first:]
    for entry, row in zip(found, table(tokens)[first:], strict=True):
        assert entry.logprob == row[entry.token].item()
        values, ids = row[: byte_tokenizer().size].sort(descending=True, stable=True)
        assert entry.top == list(zip(ids[:top].tolist(), values[:top].tolist(), strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("top", [0, 4])
def test_continuations_of_a_prefix(chunk: int, top: int) -> None:
    gate = Gate()

    async def work(engine: Engine) -> list[list[m.Logprob]]:
        with engine.open(PROMPT) as sequence:
            scores = await sequence.score(CONTINUATIONS, top)
            # The history is as before, and its continuations cost their own tokens only.
            assert (await sequence.complete(SamplingParams(max_tokens=0))).usage.history == len(PROMPT)
            return scores

    with running(gate, chunk=chunk) as engine:
        scores = finish(work(engine))
    for found, tokens in zip(scores, CONTINUATIONS, strict=True):
        assert_scored(found, PROMPT + tokens, len(PROMPT), top)
    assert sum(gate.steps) == len(PROMPT) + sum(map(len, CONTINUATIONS))


def test_a_whole_text_from_its_second_token_on() -> None:
    async def work(engine: Engine) -> list[m.Logprob]:
        with engine.open([]) as sequence:
            return await sequence.append_scored(PROMPT)

    with running(chunk=31) as engine:
        assert_scored(finish(work(engine)), PROMPT, 1)


def test_a_lone_first_token_has_nothing_to_depend_on() -> None:
    async def work(engine: Engine) -> None:
        with engine.open([]) as sequence:
            assert await sequence.append_scored(PROMPT[:1]) == []
            assert_scored(await sequence.append_scored(PROMPT[1:3]), PROMPT[:3], 1)

    with running() as engine:
        finish(work(engine))


def test_after_a_history_that_is_computed_in_full() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            await sequence.complete(SamplingParams(max_tokens=0))
            found = await sequence.append_scored([9])
            assert_scored(found, [*PROMPT, 9], len(PROMPT))
            found = await sequence.append_scored([10, 11])
            assert_scored(found, [*PROMPT, 9, 10, 11], len(PROMPT) + 1)

    with running() as engine:
        finish(work(engine))


def test_after_a_history_that_is_computed_in_part() -> None:
    """The history's own tokens are run with the scored ones, in the same chunk, and are not scored."""

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT[:50]) as sequence:
            drawn = (await sequence.complete(SamplingParams(max_tokens=5, seed=1, ignore_eos=True))).tokens
            sequence.extend(PROMPT[50:60])
            found = await sequence.append_scored([7, 8], top=1)
            assert_scored(found, [*PROMPT[:50], *drawn, *PROMPT[50:60], 7, 8], 65, top=1)

    with running() as engine:
        finish(work(engine))


def test_scored_tokens_join_the_history() -> None:
    params = SamplingParams(max_tokens=5, seed=4, ignore_eos=True)

    async def work(engine: Engine) -> list[int]:
        with engine.open(PROMPT[:100]) as sequence:
            await sequence.append_scored(PROMPT[100:])
            return (await sequence.complete(params)).tokens

    with running() as engine:
        assert finish(work(engine)) == finish(engine.generate(PROMPT, params)).tokens


def test_ids_that_the_tokenizer_lacks() -> None:
    """Part of the model's vocabulary, so a history may hold them; their text is empty."""
    history = [*PROMPT[:20], VOCABULARY - 1, *PROMPT[20:30], VOCABULARY - 2]
    params = SamplingParams(max_tokens=12, temperature=0, repetition_penalty=1.3, logprobs=3, ignore_eos=True)

    async def work(engine: Engine) -> None:
        with engine.open(history[:15]) as sequence:
            assert_scored(await sequence.append_scored(history[15:], top=3), history, 15, top=3)
            output = await sequence.complete(params)
        assert output.tokens == drawn_again(history, output.tokens, params)
        assert_scored(output.logprobs, history + output.tokens, len(history), top=3)

    with running() as engine:
        finish(work(engine))


def test_many_sequences_at_once() -> None:
    async def one(engine: Engine, seed: int) -> None:
        tokens = some_tokens(20 + seed, seed)
        with engine.open(tokens[:10]) as sequence:
            assert_scored(await sequence.append_scored(tokens[10:], top=2), tokens, 10, top=2)

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(one(engine, seed) for seed in range(8)))

    with running(chunk=13) as engine:
        finish(work(engine))


def test_more_continuations_than_slots() -> None:
    continuations = [some_tokens(3, seed) for seed in range(20)]

    async def work(engine: Engine) -> list[list[m.Logprob]]:
        with engine.open(PROMPT[:20]) as sequence:
            return await sequence.score(continuations)

    with running(slots=4) as engine:
        for found, tokens in zip(finish(work(engine)), continuations, strict=True):
            assert_scored(found, PROMPT[:20] + tokens, 20)


def test_nothing_to_score_is_an_empty_answer() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT[:5]) as sequence:
            assert await sequence.append_scored([]) == []
            assert await sequence.score([[]]) == [[]]
            assert await sequence.score([]) == []

    with running() as engine:
        finish(work(engine))


@pytest.mark.parametrize("top", [-1, 65])
def test_an_impossible_top_is_refused(top: int) -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT[:5]) as sequence:
            with pytest.raises(RequestError) as caught:
                await sequence.append_scored([5], top)
            assert (caught.value.field, caught.value.value) == ("top", top)
            with pytest.raises(RequestError, match="top"):
                await sequence.score([[5]], top)
            assert await sequence.append_scored([]) == []

    with running() as engine:
        finish(work(engine))
