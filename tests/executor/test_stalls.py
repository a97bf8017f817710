"""Programs that compute where they should wait, and programs in threads."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from typing import Any

import pytest
import sglang as sgl

from support.executor import GEN, check, executing
from weft.backend.executor import ProgramError, Run, Stall, declare
from weft.runtime.errors import Cancelled


@sgl.function
def holding(s: Any, seconds: float) -> None:
    s += "a" + sgl.gen("x", **GEN)
    _ = s["x"]
    _blocks(seconds)
    s += sgl.gen("y", **GEN)


def _blocks(seconds: float) -> None:
    time.sleep(seconds)  # here


def test_who_holds_the_loop_is_reported_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    stalls: list[Stall] = []

    async def work() -> None:
        async with executing(stall=0.1, on_stall=stalls.append) as executor:
            await executor.run(holding, 0.4)

    check(work())
    own = [stall for stall in stalls if stall.seconds > 0.3]
    lines, first = inspect.getsourcelines(_blocks)
    place = first + next(i for i, line in enumerate(lines) if "# here" in line)
    assert [(stall.program, stall.file, stall.line) for stall in own] == [("holding", __file__, place)]
    assert f"{__file__}:{place}" in caplog.text and "holding held the loop" in caplog.text


def test_waiting_is_no_stall() -> None:
    stalls: list[Stall] = []

    @sgl.function
    async def waiting(s: Any) -> None:
        await asyncio.sleep(0.4)

    async def work() -> None:
        async with executing(stall=0.3, on_stall=stalls.append) as executor:
            await executor.run(waiting)

    check(work())
    assert stalls == []


@declare(thread=True)
@sgl.function
def threaded(s: Any, seconds: float) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    _ = s["x"]
    time.sleep(seconds)
    forks = s.fork(2)
    forks += sgl.gen("y", **GEN)
    branches = s.gather(lambda b: threading.get_ident(), lambda b: b.__iadd__(sgl.gen("z", **GEN)) and None)
    forks.join()
    s += "b" + sgl.gen("w", **GEN)
    s.call(_nothing)
    return threading.get_ident(), branches[0].value


def _nothing() -> None:
    pass


@sgl.function
def not_threaded(s: Any, seconds: float) -> Any:
    return threaded.func(s, seconds)


def test_a_program_may_run_in_a_thread() -> None:
    stalls: list[Stall] = []

    async def work() -> None:
        async with executing(stall=0.1, on_stall=stalls.append) as executor:
            ended, plain = await asyncio.gather(executor.run(threaded, 0.3), executor.run(not_threaded, 0.0))
            assert (
                ended.value == (ended.value[0], threading.get_ident()) and ended.value[0] != threading.get_ident()
            )
            assert ended.text() == plain.text()
            assert ended.state.lane.variables == plain.state.lane.variables

    check(work())
    assert [stall for stall in stalls if stall.program == "threaded"] == []


def test_a_cancelled_thread_cannot_go_on() -> None:
    seen: list[Any] = []

    @declare(thread=True)
    @sgl.function
    def program(s: Any) -> None:
        s += "a" + sgl.gen("x", **GEN)
        _ = s["x"]
        time.sleep(0.3)
        try:
            s += sgl.gen("y", **GEN)
        except (Cancelled, ProgramError) as error:
            seen.append(error)
            raise

    async def work() -> None:
        async with executing() as executor:
            task = asyncio.ensure_future(executor.run(program))
            await asyncio.sleep(0.15)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not seen:
                await asyncio.sleep(0.01)

    check(work())


def test_errors_of_a_thread_are_its_programs() -> None:
    @declare(thread=True)
    @sgl.function
    def program(s: Any, where: str) -> None:
        if where == "body":
            raise LookupError("mine")
        s += sgl.gen("odd", temperature=-1)
        _ = s["odd"]

    async def work() -> None:
        async with executing() as executor:
            body, read = await executor.batch(program, [{"where": "body"}, {"where": "read"}])
            assert isinstance(body, LookupError)
            assert isinstance(read, ProgramError) and read.variable == "odd"
            (ended,) = await executor.batch(threaded, [{"seconds": 0.0}])
            assert isinstance(ended, Run)

    check(work())
