"""A caller may leave at any moment; what its call held is free after the step that runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from torch import Tensor

from support.engine import (
    SECONDS,
    Gate,
    core_of,
    drawn_again,
    finish,
    is_empty,
    is_idle,
    running,
    some_tokens,
    until,
    wait_for,
)
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import DeadlineExceeded, RequestError
from weft.runtime.model.batch import Batch

PROMPT = some_tokens(40, seed=5)
PARAMS = SamplingParams(max_tokens=500, seed=1, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_while_it_draws() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        task = asyncio.ensure_future(engine.generate(PROMPT, PARAMS))
        await until(lambda: len(gate.steps) > 5)
        await cancelled(task)
        await until(lambda: is_empty(engine))
        assert len(gate.steps) < 100

    with running(gate) as engine:
        finish(work(engine))


def test_while_a_long_prompt_is_computed() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        task = asyncio.ensure_future(engine.generate(some_tokens(400), PARAMS))
        await until(lambda: bool(gate.steps))
        await cancelled(task)
        gate.open()
        await until(lambda: is_idle(engine))
        assert gate.steps == [8]  # the step that ran was the last

    with running(gate, chunk=8) as engine:
        finish(work(engine))


def test_while_it_waits_for_a_call_before_it() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            gate.shut()
            first = asyncio.ensure_future(sequence.complete(SHORT))
            second = asyncio.ensure_future(sequence.append_scored(some_tokens(50)))
            third = asyncio.ensure_future(sequence.complete(SHORT))
            await until(lambda: bool(gate.steps))
            await cancelled(second)
            gate.open()
            assert (await first).usage.history == 40
            # What was to be scored never joined the history.
            assert (await third).usage.history == 44

    with running(gate) as engine:
        finish(work(engine))


def test_while_it_waits_for_a_slot() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        first = asyncio.ensure_future(engine.generate(PROMPT, SHORT))
        await until(lambda: bool(gate.steps))
        second = asyncio.ensure_future(engine.generate(PROMPT, SHORT))
        await asyncio.sleep(0)
        await cancelled(second)
        gate.open()
        assert len((await first).tokens) == 4
        assert gate.steps == [40, 1, 1, 1]

    with running(gate, slots=1) as engine:
        finish(work(engine))


def test_the_sequence_goes_on_from_the_tokens_it_has() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            seen: list[int] = []

            async def read() -> None:
                async for event in sequence.generate(PARAMS):
                    assert isinstance(event, m.Delta)
                    seen.extend(event.tokens)

            task = asyncio.ensure_future(read())
            await until(lambda: len(seen) >= 3)
            await cancelled(task)
            output = await sequence.complete(SHORT)
            drawn = output.usage.history - len(PROMPT)
            assert drawn >= len(seen)
            whole = (
                await engine.generate(PROMPT, SamplingParams(max_tokens=drawn, seed=1, ignore_eos=True))
            ).tokens
            assert whole[: len(seen)] == seen
            assert output.tokens == drawn_again(PROMPT + whole, output.tokens, SHORT)

    with running() as engine:
        finish(work(engine))


def test_leaving_the_stream_cancels_the_call() -> None:
    async def work(engine: Engine) -> None:
        sequence = engine.open(PROMPT)
        stream = sequence.generate(PARAMS)
        async for _ in stream:
            break
        await stream.aclose()
        await until(lambda: not core_of(engine).calls)
        assert core_of(engine).sequences[sequence.id].tokens[:40] == PROMPT
        sequence.close()

    with running() as engine:
        finish(work(engine))


def each_call() -> dict[str, Callable[[Engine], Coroutine[Any, Any, Any]]]:
    async def complete(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            await sequence.complete(PARAMS)

    async def fork(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            for child in await sequence.fork(3):
                child.close()

    async def score(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            await sequence.score([PROMPT, PROMPT[:20]])

    async def append_scored(engine: Engine) -> None:
        with engine.open([]) as sequence:
            await sequence.append_scored(PROMPT)

    return {f.__name__: f for f in (complete, fork, score, append_scored)}


@pytest.mark.parametrize("name", each_call())
@pytest.mark.parametrize("steps", range(0, 8, 2))
def test_at_every_stage_of_every_call(name: str, steps: int) -> None:
    """Cancelled after so many steps. `running` finds whatever stays behind; another call is not touched."""
    gate = Gate()

    async def work(engine: Engine) -> None:
        bystander = asyncio.ensure_future(engine.generate(PROMPT[:9], SamplingParams(max_tokens=9, seed=3)))
        task = asyncio.ensure_future(each_call()[name](engine))
        await until(lambda: len(gate.steps) >= steps)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        output = (await bystander).tokens
        assert output == drawn_again(PROMPT[:9], output, SamplingParams(max_tokens=9, seed=3))

    with running(gate, chunk=11) as engine:
        finish(work(engine))


def test_a_timeout_is_a_cancellation() -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await engine.generate(PROMPT, PARAMS)

    with running() as engine:
        finish(work(engine))


def test_a_deadline_ends_calls_that_run_and_calls_that_wait() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            first = asyncio.ensure_future(sequence.complete(PARAMS, deadline=0.5))
            second = asyncio.ensure_future(sequence.fork(deadline=0.1))
            third = asyncio.ensure_future(sequence.append_scored([5], deadline=0.1))
            for call in (second, third):
                with pytest.raises(DeadlineExceeded):
                    await call
            assert not first.done()
            with pytest.raises(DeadlineExceeded):
                await first
            for call in (sequence.complete(SHORT, deadline=0), sequence.fork(deadline=-1.0)):
                with pytest.raises(RequestError, match="deadline"):
                    await call
            assert len((await sequence.complete(SHORT, deadline=SECONDS)).tokens) == 4

    with running() as engine:
        finish(work(engine))


def test_a_loop_that_is_gone_leaves_nothing_behind() -> None:
    """asyncio.run cancels what still runs; the core notices although nobody waits any more."""

    async def work(engine: Engine) -> None:
        task = asyncio.ensure_future(engine.generate(PROMPT, PARAMS))
        await until(lambda: bool(core_of(engine).calls))
        assert not task.done()

    with running() as engine:
        finish(work(engine))
        wait_for(lambda: is_idle(engine))


def test_a_deadline_passes_while_the_core_does_not_answer() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        with pytest.raises(DeadlineExceeded, match="does not answer"):
            await engine.generate(PROMPT, SHORT, deadline=0.1)
        gate.open()
        await until(lambda: is_empty(engine))

    with running(gate) as engine:
        finish(work(engine))


def test_calls_of_several_parts_have_one_deadline() -> None:
    """Each part is quick enough, all together are not."""

    class Slow(Gate):
        def forward(self, ids: Tensor, batch: Batch) -> Tensor:
            time.sleep(0.02)
            return super().forward(ids, batch)

    async def work(engine: Engine) -> None:
        for call in (
            engine.generate(some_tokens(96), SHORT, 0.3, prompt_logprobs=0),
            engine.sample(some_tokens(96, seed=1), SamplingParams(max_tokens=8, seed=1, ignore_eos=True), 2, 0.3),
        ):
            with pytest.raises(DeadlineExceeded):
                await call
        with engine.open(PROMPT) as sequence, pytest.raises(DeadlineExceeded):
            await sequence.score([some_tokens(9, i) for i in range(200)], deadline=0.3)

    with running(Slow(), chunk=8) as engine:
        finish(work(engine))
