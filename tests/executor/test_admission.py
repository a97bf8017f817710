"""What programs need is reserved before they begin, or they are told at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sglang as sgl

from support.executor import GEN, check, executing, settled
from weft.backend.executor import Need, Run, declare
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.errors import Overloaded, RequestError

POOLS = PoolSizes(tokens=4096, slots=8, context=1024, burst=256, page=16)
STATES: list[str] = []


@declare(states=3, tokens=1000)
@sgl.function
def reserving(s: Any, event: asyncio.Event) -> None:
    STATES.append("began")
    s += "Once "
    forks = s.fork(2)
    forks += sgl.gen("x", **GEN)
    forks.join()
    from weft.backend.executor import Tool

    s.call(Tool(event.wait, name="wait", description="", parameters={}, check=dict, here=True))
    STATES.append("ended")


def test_a_run_has_what_it_needs_or_is_refused_before_it_begins() -> None:
    async def work() -> None:
        STATES.clear()
        async with executing(pools=POOLS) as executor:
            event = asyncio.Event()
            running = [asyncio.ensure_future(executor.run(reserving, event)) for _ in range(2)]
            await settled()
            assert STATES == ["began"] * 2
            with pytest.raises(Overloaded, match="6 of 8 states and 2000 of 4096 tokens") as caught:
                await executor.run(reserving, event)
            assert STATES == ["began"] * 2 and caught.value.retry_after > 0
            event.set()
            first, second = await asyncio.gather(*running)
            assert first.most.states == second.most.states == 3
            await executor.run(reserving, event)  # there is room again

    check(work())


def test_who_is_patient_waits_its_turn() -> None:
    async def work() -> None:
        async with executing(pools=POOLS, patience=0.05) as executor:
            event = asyncio.Event()
            running = [asyncio.ensure_future(executor.run(reserving, event)) for _ in range(3)]
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            assert [type(task.exception()) for task in done] == [Overloaded]
            event.set()
            await asyncio.wait(running)
            results = await executor.batch(reserving, [{"event": event}] * 9, concurrency=9)
            assert [type(result) for result in results] == [Run] * 9  # a batch waits as long as it takes

    check(work())


def test_a_cancelled_wait_gives_its_place_to_the_next() -> None:
    async def work() -> None:
        async with executing(pools=POOLS, patience=None) as executor:
            event = asyncio.Event()
            running = [asyncio.ensure_future(executor.run(reserving, event)) for _ in range(4)]
            await settled()
            running[2].cancel()
            await settled()
            event.set()
            results = await asyncio.gather(*running, return_exceptions=True)
            assert [type(result) for result in results] == [Run, Run, asyncio.CancelledError, Run]

    check(work())


def test_what_can_never_be_had_is_refused_by_name() -> None:
    @declare(states=9)
    @sgl.function
    def wide(s: Any) -> None:
        pass

    @declare(tokens=5000)
    @sgl.function
    def long(s: Any) -> None:
        pass

    async def work() -> None:
        async with executing(pools=POOLS) as executor:
            with pytest.raises(RequestError, match="states = 9"):
                await executor.run(wide)
            with pytest.raises(RequestError, match="tokens = 5000"):
                await executor.run(long)

    check(work())


@sgl.function
def forking(s: Any, width: int) -> None:
    s += "A text of twenty-five.... "
    forks = s.fork(width)
    forks += sgl.gen("x", **GEN)
    forks.join()
    s += sgl.gen("y", **GEN)


def test_what_runs_held_is_known_and_can_be_reserved_for_the_next() -> None:
    async def work() -> None:
        async with executing(pools=POOLS, reserve="traced") as executor:
            ended = await executor.run(forking, 5)
            # The text and BOS once, eight tokens of each child; then eight more of its own.
            assert ended.most == Need(6, 27 + 5 * 8) and ended.cost.states == 6
            assert (await executor.run(forking, 1)).most == Need(2, 27 + 8)
            first = asyncio.ensure_future(executor.run(forking, 1))
            await settled()
            with pytest.raises(Overloaded, match="6 of 8 states"):
                await executor.run(forking, 1)
            await first

    check(work())
