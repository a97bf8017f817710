"""One prompt and one seed give one output: alone, in company, after forks, in any pieces."""

from __future__ import annotations

import asyncio
import itertools
from functools import cache

import pytest

from support.engine import Gate, drawn_again, finish, running, some_tokens
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output, Sequence

PROMPT = some_tokens(150, seed=1)
PARAMS = SamplingParams(max_tokens=24, seed=11, temperature=1.1, top_p=0.95, logprobs=2, ignore_eos=True)


def fields(output: Output) -> tuple[object, ...]:
    """All of an output but the seconds it took."""
    return output.tokens, output.text, output.logprobs, output.finish_reason, output.stop, output.kept


@cache
def alone() -> tuple[object, ...]:
    with running() as engine:
        return fields(finish(engine.generate(PROMPT, PARAMS)))


def test_alone_it_is_what_sampling_draws_from_a_cold_run() -> None:
    tokens = alone()[0]
    assert isinstance(tokens, list)
    assert tokens == drawn_again(PROMPT, tokens, PARAMS)


def test_in_a_batch_of_sixteen() -> None:
    """With prompts that end early, begin late or share its start, and with other parameters."""
    gate = Gate()

    async def work() -> Output:
        others = []
        for i in range(15):
            start = PROMPT[: 10 * i] if i % 2 else []
            params = SamplingParams(max_tokens=4 + 3 * i, seed=i, temperature=i % 3, ignore_eos=True)
            others.append(engine.generate(start + some_tokens(1 + 13 * i, seed=i), params))
        first, *_ = await asyncio.gather(engine.generate(PROMPT, PARAMS), *others)
        return first

    with running(gate) as engine:
        assert fields(finish(work())) == alone()
    assert max(gate.steps) > 64  # prefill and decodes ran together


def test_twice_in_one_batch() -> None:
    async def work() -> list[Output]:
        return await asyncio.gather(*(engine.generate(PROMPT, PARAMS) for _ in range(3)))

    with running() as engine:
        assert [fields(output) for output in finish(work())] == [alone()] * 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_with_any_chunk_size(chunk: int) -> None:
    gate = Gate()
    with running(gate, chunk=chunk) as engine:
        assert fields(finish(engine.generate(PROMPT, PARAMS))) == alone()
    assert max(gate.steps) == min(chunk, len(PROMPT))


@pytest.mark.parametrize("page", [1, 7, 64])
def test_with_any_page_size(page: int) -> None:
    with running(page=page) as engine:
        assert fields(finish(engine.generate(PROMPT, PARAMS))) == alone()


@pytest.mark.parametrize("cuts", [(1,), (149,), (4, 8, 16), (127, 128, 129), tuple(range(0, 150, 11))])
def test_in_pieces(cuts: tuple[int, ...]) -> None:
    """Whether the pieces are only appended, or computed one by one."""

    async def work(engine: Engine, computed: bool) -> Output:
        ends = [*cuts, len(PROMPT)]
        with engine.open(PROMPT[: ends[0]]) as sequence:
            for start, end in itertools.pairwise(ends):
                if computed and start:
                    await sequence.complete(SamplingParams(max_tokens=0))
                sequence.extend(PROMPT[start:end])
            return await sequence.complete(PARAMS)

    with running() as engine:
        for computed in (False, True):
            assert fields(finish(work(engine, computed))) == alone()


@pytest.mark.parametrize("at", [1, 64, 127, 128, 150])
def test_after_a_fork_at_any_place(at: int) -> None:
    """On the parent and on its children, while siblings go their own ways."""

    async def work(engine: Engine) -> list[Output]:
        parent = engine.open(PROMPT[:at])
        children = await parent.fork(3)
        children[0].extend(some_tokens(30, seed=9))
        stray = asyncio.ensure_future(children[0].complete(SamplingParams(max_tokens=30, seed=2)))
        for one in (parent, *children[1:]):
            one.extend(PROMPT[at:])
        outputs = await asyncio.gather(*(one.complete(PARAMS) for one in (parent, *children[1:])))
        await stray
        for one in (parent, *children):
            one.close()
        return outputs

    with running() as engine:
        assert [fields(output) for output in finish(work(engine))] == [alone()] * 3


def test_when_continued_from_its_own_output() -> None:
    """A second generation of a sequence goes on as if it had been one."""

    async def work(engine: Engine) -> list[int]:
        half = SamplingParams(max_tokens=12, seed=11, temperature=1.1, top_p=0.95, ignore_eos=True)
        with engine.open(PROMPT) as sequence:
            first = await sequence.complete(half)
            (child,) = await sequence.fork()
            with child:
                seconds = [(await one.complete(half)).tokens for one in (child, sequence)]
            assert seconds[0] == seconds[1]
            return first.tokens + seconds[0]

    with running() as engine:
        assert finish(work(engine)) == alone()[0]


def test_after_others_used_the_memory() -> None:
    """Small pools, so that slots and pages come back with other sequences' rows in them."""

    async def work(engine: Engine) -> Output:
        for seed in range(4):
            await engine.generate(some_tokens(170, seed), SamplingParams(max_tokens=4))
        return await engine.generate(PROMPT, PARAMS)

    with running(slots=1, tokens=192, context=192, burst=64) as engine:
        assert fields(finish(work(engine))) == alone()


def test_siblings_differ_only_by_their_seed() -> None:
    async def work(engine: Engine) -> list[list[int]]:
        parent = engine.open(PROMPT)
        family = [parent, *await parent.fork(5)]
        seeds = [1, 2, 1, 2, 1, 2]
        params = [SamplingParams(max_tokens=10, seed=seed, ignore_eos=True) for seed in seeds]
        outputs = await asyncio.gather(*(s.complete(p) for s, p in zip(family, params, strict=True)))
        close(family)
        return [output.tokens for output in outputs]

    with running() as engine:
        outputs = finish(work(engine))
    assert outputs[0::2] == [outputs[0]] * 3
    assert outputs[1::2] == [outputs[1]] * 3
    assert outputs[0] != outputs[1]


def close(family: list[Sequence]) -> None:
    for one in family:
        one.close()
