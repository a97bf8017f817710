"""What sglang's interpreter gets wrong, and what the executor does in its place: nineteen faults, each of which
was reproduced there on 0.5.2 and 0.5.23. The first part."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import sglang as sgl

from support.engine import core_of, is_empty, until
from support.executor import GEN, check, executing
from weft.backend.executor import ProgramError, Run
from weft.runtime.engine.messages import Delta
from weft.runtime.errors import RequestError

LONG: dict[str, Any] = {"max_tokens": 120, "temperature": 0, "ignore_eos": True}


@sgl.function
def wide(s: Any, width: int) -> int:
    s += "Once "
    forks = s.fork(width)
    forks += lambda i: f"{i} "
    threads = threading.active_count()
    forks.join()
    return threads


def test_1_a_state_costs_no_thread() -> None:
    async def work() -> None:
        async with executing() as executor:
            await executor.run(wide, 1)
            before = threading.active_count()
            assert (await executor.run(wide, 1000)).value == before

    check(work())


_LEAVES_A_FORK = """
import asyncio, sys
sys.path[:0] = [{path!r}]
import sglang as sgl
from support.programs import babbling_model, open_engine
from weft.backend.executor import ProgramExecutor

@sgl.function
def program(s):
    s += "a"
    kept.append(s.fork(2)[1])
    kept[0] += sgl.gen("x", max_tokens=2)

kept = []
with open_engine(babbling_model()) as engine:
    asyncio.run(ProgramExecutor(engine).run(program))
print("ended", flush=True)
"""


def test_2_python_exits_with_a_fork_that_nobody_joined() -> None:
    path = __file__.rsplit("/executor/", 1)[0]
    code = _LEAVES_A_FORK.format(path=path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


@sgl.function
def unread(s: Any) -> None:
    s += "a" + sgl.gen("x", **GEN)
    s.fork(2)[0].__iadd__(sgl.gen("y", **GEN))


def test_3_a_run_ends_when_its_work_is_done_and_then_gives_all_back() -> None:
    async def work() -> None:
        async with executing() as executor:
            ended = await executor.run(unread)
            assert ended.state.get_meta_info("x")["completion_tokens"] == 8
            assert ended.cost.generated == 16  # the fork's too, though nobody asked for it
            await until(lambda: is_empty(executor.engine))
            assert ended.text().startswith("a")

    check(work())


@sgl.function
def failing(s: Any, where: str) -> Any:
    s += "a"
    forks = s.fork(3)
    for i, fork in enumerate(forks):
        fork += sgl.gen("x", **GEN) if i != 1 else sgl.gen("odd", temperature=-1)
    forks.join()


@sgl.function
def raising(s: Any) -> None:
    s += "a" + sgl.gen("x", **GEN)
    raise LookupError("mine")


def test_4_errors_are_raised_where_they_matter_and_tell_their_origin() -> None:
    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(ProgramError) as caught:
                await executor.run(failing, "fork")
            error = caught.value
            assert (error.program, error.path, error.variable) == ("failing", "/1", "odd")
            assert isinstance(error.__cause__, RequestError) and error.__cause__.field == "temperature"
            assert [set(own) for own in error.partial] == [{"x"}, set(), {"x"}]
            with pytest.raises(LookupError, match="mine"):  # in stream mode too
                async for _ in executor.stream(raising):
                    pass

    check(work())


@sgl.function
def goes_on(s: Any) -> list[str]:
    s += "a" + sgl.gen("odd", temperature=-1)
    with contextlib.suppress(ProgramError):
        s.sync()
    time.sleep(0.05)
    seen = []
    for use in (lambda: s.text(), s.sync, lambda: s["odd"], lambda: s["other"], lambda: s.__iadd__("b")):
        try:
            use()
        except ProgramError as error:
            seen.append(str(error.variable))
    assert isinstance(s.error(), ProgramError)
    return seen


def test_5_nothing_hangs_after_a_failure() -> None:
    async def work() -> None:
        async with executing() as executor:
            seen: list[Any] = []

            @sgl.function
            def outer(s: Any) -> None:
                seen.append(goes_on.func(s.fork(1)[0]))

            with pytest.raises(ProgramError, match="odd"):
                await executor.run(outer)
            assert seen == [["odd"] * 5]

    check(work())


def test_6_a_batch_keeps_what_succeeded() -> None:
    async def work() -> None:
        async with executing() as executor:
            results = await executor.batch(raising, [{}] * 2) + await executor.batch(unread, [{}] * 2)
            assert [type(result) for result in results] == [LookupError, LookupError, Run, Run]

    check(work())


@sgl.function
def long(s: Any) -> None:
    s += "a" + sgl.gen("x", **LONG) + sgl.gen("y", **LONG)


def test_7_leaving_cancelling_and_deadlines_end_the_work() -> None:
    async def work() -> None:
        async with executing() as executor:
            engine, core, drawn = executor.engine, core_of(executor.engine), 0
            emit = core.emit

            def counted(event: Any) -> None:
                nonlocal drawn
                drawn += len(event.tokens) if isinstance(event, Delta) else 0
                emit(event)

            core.emit = counted  # type: ignore[method-assign]
            async for _ in executor.stream(long):
                break
            await until(lambda: is_empty(engine))
            assert 0 < drawn < 60  # of 240
            task = asyncio.ensure_future(executor.run(long))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: is_empty(engine))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await executor.run(long)
            await until(lambda: is_empty(engine))

    check(work())
