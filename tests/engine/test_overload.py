"""When slots, pages or the queue run out, calls wait or hear `Overloaded`, and the others finish."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from support.engine import Gate, core_of, drawn_again, finish, running, small_model, some_tokens, until
from support.run import run
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output, Sequence
from weft.runtime.errors import Overloaded

PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


async def outcomes(*work: Any) -> list[Any]:
    return await asyncio.gather(*work, return_exceptions=True)


def finished(results: list[Any], prompts: list[list[int]], params: SamplingParams = PARAMS) -> list[int]:
    """Which ones; each is right. The others were overloaded."""
    done = []
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        if isinstance(result, Output):
            assert result.tokens == drawn_again(prompt, result.tokens, params)
            done.append(i)
        else:
            assert isinstance(result, Overloaded), result
            assert result.retry_after > 0
    return done


# -- slots ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_calls_than_slots_wait_their_turn(slots: int) -> None:
    prompts = [some_tokens(20, seed) for seed in range(9)]

    async def work(engine: Engine) -> list[Any]:
        return await outcomes(*(engine.generate(prompt, PARAMS) for prompt in prompts))

    with running(slots=slots) as engine:
        assert finished(finish(work(engine)), prompts) == list(range(9))


def test_a_fork_waits_for_slots_that_running_calls_will_free() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        parent = engine.open(some_tokens(9))
        forking = asyncio.ensure_future(parent.fork(2))
        other = asyncio.ensure_future(engine.generate(some_tokens(9), PARAMS))
        await until(lambda: bool(gate.steps))
        gate.open()
        assert len((await other).tokens) == 6
        for one in (parent, *await forking):
            one.close()

    with running(gate, slots=3) as engine:
        finish(work(engine))


def test_a_fork_larger_than_the_engine() -> None:
    """Children without a slot begin from what is kept of their parent, when they are asked for something."""

    async def work(engine: Engine) -> None:
        prompt = some_tokens(9)
        with engine.open(prompt) as parent:
            children = await parent.fork(7)
            outputs = await asyncio.gather(*(child.complete(PARAMS) for child in (parent, *children)))
            assert finished(list(outputs), [prompt] * 8) == list(range(8))
            assert all(output.usage.cached == 9 for output in outputs)
            for child in children:
                child.close()

    with running(slots=3) as engine:
        finish(work(engine))


def test_forks_that_are_wider_together_than_the_engine() -> None:
    gate = Gate()

    async def fork(parent: Sequence) -> None:
        with parent:
            for child in await parent.fork(3):
                child.close()

    async def work(engine: Engine) -> list[Any]:
        parents = [engine.open(some_tokens(9, seed)) for seed in range(3)]
        for parent in parents:
            await parent.complete(SamplingParams(max_tokens=0))
        gate.steps.clear()
        gate.shut()
        last = asyncio.ensure_future(engine.generate([5], SamplingParams(max_tokens=1)))
        await until(lambda: bool(gate.steps))
        forks = [asyncio.ensure_future(fork(parent)) for parent in parents]
        await asyncio.sleep(0)
        gate.open()  # and the core reads all three calls at once
        return await outcomes(last, *forks)

    with running(gate, slots=4) as engine:
        assert finish(work(engine))[1:] == [None] * 3


# -- pages ---------------------------------------------------------------------------------------------

# 10 c4 pages of 4 rows for up to three sequences: two of 80 tokens fit, or one of 160.
TIGHT = {"tokens": 64, "slots": 3, "context": 160, "burst": 64, "page": 4}


def test_refusing_one_call_is_enough_when_that_frees_the_memory() -> None:
    """Three outputs grow until the pages are gone; the youngest gives way and the others finish."""
    params = SamplingParams(max_tokens=38, seed=1, ignore_eos=True)
    prompts = [some_tokens(40, seed) for seed in range(3)]

    async def work(engine: Engine) -> list[Any]:
        return await outcomes(*(engine.generate(prompt, params) for prompt in prompts))

    with running(**TIGHT) as engine:
        done = finished(finish(work(engine)), prompts, params)
    assert done in ([0, 1], [0, 1, 2])  # all three if memory is taken away and given back instead


def test_the_oldest_call_finishes_whatever_the_others_need() -> None:
    params = SamplingParams(max_tokens=110, seed=1, ignore_eos=True)
    prompts = [some_tokens(40, seed) for seed in range(3)]

    async def work(engine: Engine) -> list[Any]:
        return await outcomes(*(engine.generate(prompt, params) for prompt in prompts))

    with running(**TIGHT) as engine:
        assert 0 in finished(finish(work(engine)), prompts, params)


def test_one_that_can_never_fit_is_refused_alone() -> None:
    """The context is longer than what all pages hold."""
    short = some_tokens(9)

    async def work(engine: Engine) -> list[Any]:
        long = engine.generate(some_tokens(300), PARAMS)
        return await outcomes(long, *(engine.generate(short, PARAMS) for _ in range(4)))

    with running(**TIGHT | {"context": 400}) as engine:
        first, *others = finish(work(engine))
    assert isinstance(first, Overloaded)
    assert finished(others, [short] * 4) == [0, 1, 2, 3]


def test_an_older_call_gets_more_than_one_younger_call_holds() -> None:
    """It needs eight pages at once and has been waiting for its turn; the two that filled them hold four each."""

    async def work(engine: Engine) -> None:
        with engine.open(some_tokens(4)) as sequence:
            first = asyncio.ensure_future(sequence.complete(TWENTY))
            older = asyncio.ensure_future(sequence.append_scored(some_tokens(120, seed=1)))
            await asyncio.sleep(0)
            younger = [asyncio.ensure_future(engine.generate(some_tokens(30, seed), FORTY)) for seed in range(2)]
            await first
            assert len(await older) == 120
        assert finished(await outcomes(*younger), [some_tokens(30, seed) for seed in range(2)], FORTY) is not None

    with running(chunk=128, **TIGHT | {"burst": 128}) as engine:
        finish(work(engine))


TWENTY = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
FORTY = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)


def test_scores_survive_losing_their_memory() -> None:
    """Scoring begins again when its pages were taken for an older call; no token is scored twice or left out."""
    tokens = some_tokens(150, seed=8)

    async def work(engine: Engine) -> None:
        for _ in range(20):  # outputs are short here, it seems
            await engine.generate([5], SamplingParams(max_tokens=1))
        gate.steps.clear()
        with engine.open(tokens[:2]) as sequence:
            older = asyncio.ensure_future(engine.generate(some_tokens(60), OLDER))
            await until(lambda: bool(gate.steps))
            found = await sequence.append_scored(tokens[2:])
            assert finished([await older], [some_tokens(60)], OLDER) == [0]
        logits = run(small_model(), tokens)[1:-1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens[2:])[:, None])[:, 0]
        assert [entry.token for entry in found] == tokens[2:]
        assert [entry.logprob for entry in found] == expected.tolist()

    gate = Gate()
    with running(gate, chunk=2, **TIGHT | {"burst": 64, "tokens": 144}) as engine:
        finish(work(engine))
        assert core_of(engine).scheduler.preempted > 0


OLDER = SamplingParams(max_tokens=95, seed=1, ignore_eos=True)


@pytest.mark.parametrize("count", [2, 6])
def test_long_prompts_one_after_another(count: int) -> None:
    """Each takes nearly all pages."""
    prompts = [some_tokens(150, seed) for seed in range(count)]

    async def work(engine: Engine) -> list[Any]:
        return await outcomes(*(engine.generate(prompt, PARAMS) for prompt in prompts))

    with running(**TIGHT) as engine:
        assert finished(finish(work(engine)), prompts) == list(range(count))


def test_children_that_cannot_all_go_on() -> None:
    """Forks share their parent's pages, so refusing one frees little: the eldest still finishes."""
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    prompt = some_tokens(80)

    async def work(engine: Engine) -> list[Any]:
        parent = engine.open(prompt)
        children = await parent.fork(2)
        calls = [asyncio.ensure_future(one.complete(params)) for one in (parent, *children)]
        results = await outcomes(*calls)
        for one in (parent, *children):
            one.close()
        return results

    with running(**TIGHT) as engine:
        assert 0 in finished(finish(work(engine)), [prompt] * 3, params)


def test_a_fork_that_waits_for_slots_does_not_keep_memory_from_older_calls() -> None:
    """It is the youngest, so it gives way, and must not be computed again before they have moved."""
    gate = Gate()
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    prompts = [some_tokens(40, seed) for seed in range(3)]

    async def work(engine: Engine) -> None:
        gate.shut()
        older = [asyncio.ensure_future(engine.generate(prompt, params)) for prompt in prompts]
        await until(lambda: bool(gate.steps))
        with engine.open(some_tokens(3)) as parent:
            forking = asyncio.ensure_future(parent.fork(2))
            await asyncio.sleep(0)
            gate.open()
            assert finished(await outcomes(*older), prompts, params) == [0, 1, 2]
            for child in await forking:
                child.close()

    with running(gate, **TIGHT | {"slots": 4}) as engine:
        finish(work(engine))


# -- the queue -----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_only_the_newcomer() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        calls = [asyncio.ensure_future(engine.generate(some_tokens(9), PARAMS)) for _ in range(4)]
        await until(lambda: bool(gate.steps))
        fifth = asyncio.ensure_future(engine.generate(some_tokens(9), PARAMS))
        await asyncio.sleep(0)
        gate.open()  # messages are read between steps
        with pytest.raises(Overloaded, match="4 calls are waiting"):
            await fifth
        assert [len((await call).tokens) for call in calls] == [6] * 4
        assert len((await engine.generate(some_tokens(9), PARAMS)).tokens) == 6

    with running(gate, queue=4) as engine:
        finish(work(engine))


def test_a_full_queue_refuses_every_kind_of_call() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        sequence = engine.open(some_tokens(9))
        gate.shut()
        first = asyncio.ensure_future(sequence.complete(PARAMS))
        await until(lambda: bool(gate.steps))
        others = [asyncio.ensure_future(call) for call in (sequence.fork(), sequence.append_scored([5]))]
        await asyncio.sleep(0)
        gate.open()
        assert [type(result) for result in await outcomes(*others)] == [Overloaded, Overloaded]
        assert len((await first).tokens) == 6
        assert (await sequence.complete(PARAMS)).usage.history == 9 + 6
        sequence.close()

    with running(gate, queue=1) as engine:
        finish(work(engine))


def test_open_sequences_are_no_calls() -> None:
    async def work(engine: Engine) -> None:
        sequences = [engine.open(some_tokens(9)) for _ in range(50)]
        assert len((await sequences[-1].complete(PARAMS)).tokens) == 6
        for sequence in sequences:
            sequence.close()

    with running(queue=1, slots=2) as engine:
        finish(work(engine))
