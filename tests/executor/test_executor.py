"""The executor by itself: what a run is, how it waits, fails and ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import Any

import pytest
import sglang as sgl

from support.engine import is_empty, until
from support.executor import GEN, check, executing
from weft.backend.executor.base import Limits, Piece, ProgramError
from weft.backend.executor.executor import ProgramExecutor, Run
from weft.runtime.engine.front import Engine
from weft.runtime.errors import DeadlineExceeded, RequestError
from weft.runtime.text.tokens import EOS


@sgl.function
def two_steps(s: Any, topic: str) -> Any:
    s += sgl.user("About " + topic) + sgl.assistant(sgl.gen("first", **GEN))
    s += sgl.user("And?") + sgl.assistant(sgl.gen("second", **GEN))
    return s["first"] + "|" + s["second"]


@sgl.function
def branches(s: Any, width: int) -> None:
    s += "Ideas: "
    forks = s.fork(width)
    forks += lambda i: f"{i}. " + sgl.gen("idea", **GEN)
    forks.join()
    s += "Best: " + sgl.gen("best", **GEN)


async def stock(engine: Engine, program: Any, **arguments: Any) -> Any:
    from weft.backend.language import DeepSeekV4Backend

    backend = DeepSeekV4Backend(engine)
    state = await asyncio.to_thread(lambda: program.run(**arguments, backend=backend))
    await asyncio.to_thread(state.sync)
    backend.shutdown()
    return state


def test_the_same_as_the_stock_interpreter() -> None:
    async def work() -> None:
        async with executing() as executor:
            for program, arguments in ((two_steps, {"topic": "tea"}), (branches, {"width": 3})):
                run = await executor.run(program, **arguments)
                state = await stock(executor.engine, program, **arguments)
                assert run.text() == state.text()
                assert run.state.messages() == state.messages()
                assert run.state.lane.variables == state.stream_executor.variables

    check(work())


def test_what_a_run_costs_and_returns() -> None:
    async def work() -> None:
        async with executing() as executor:
            run = await executor.run(two_steps, "tea")
            assert run.value == run["first"] + "|" + run["second"]
            assert run.cost.generations == 2 and run.cost.generated == 16
            assert run.cost.cached + run.cost.computed >= run.cost.prompt
            meta = run.state.get_meta_info("second")
            assert meta["cached_tokens"] > 0 and meta["completion_tokens"] == 8

    check(work())


@sgl.function
async def awaiting(s: Any, event: Any) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    await asyncio.sleep(0.01)
    seen = s["x"]
    event.set()
    s += "b" + sgl.gen("y", **GEN)
    return seen, s["y"]


def test_an_async_program_may_await_and_read() -> None:
    async def work() -> None:
        async with executing() as executor:
            event = asyncio.Event()
            run = await executor.run(awaiting, event)
            assert event.is_set() and run.value == (run["x"], run["y"])

    check(work())


def test_every_piece_is_streamed() -> None:
    async def work() -> None:
        async with executing() as executor:
            pieces: list[Piece] = []
            last: Any = None
            async for item in executor.stream(branches, width=2):
                last = item
                if isinstance(item, Piece):
                    pieces.append(item)
            assert isinstance(last, Run)
            for path, name, whole in (
                ("/0", "idea", last["idea"][0]),
                ("/1", "idea", last["idea"][1]),
                ("", "best", last["best"]),
            ):
                own = [piece for piece in pieces if (piece.path, piece.variable) == (path, name)]
                assert "".join(piece.text for piece in own) == whole and len(own) >= 8
                assert own[-1].meta["finish_reason"] is not None  # type: ignore[index]

    check(work())


@sgl.function
def failing(s: Any, where: str) -> None:
    s += "a" + sgl.gen("x", **GEN)
    if where == "body":
        raise KeyError("mine")
    forks = s.fork(2)
    forks[0] += sgl.gen("fine", **GEN)
    forks[1] += sgl.gen("odd", regex="a(?=b)", **GEN) if where == "fork" else sgl.gen("fine", **GEN)
    if where == "read":
        s += sgl.gen("odd", temperature=-1)
        _ = s["odd"]
    forks.join()


@pytest.mark.parametrize(("where", "path"), [("fork", "/1"), ("read", "")])
def test_a_failure_says_where_it_happened(where: str, path: str) -> None:
    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(ProgramError, match="failing") as caught:
                await executor.run(failing, where)
            assert (caught.value.path, caught.value.variable) == (path, "odd")
            assert isinstance(caught.value.__cause__, RequestError)
            with pytest.raises(KeyError, match="mine"):
                await executor.run(failing, "body")

    check(work())


@sgl.function
def ignoring(s: Any) -> Any:
    s += sgl.gen("odd", temperature=-1)
    with contextlib.suppress(ProgramError):
        _ = s["odd"]
    for use in (lambda: s.text(), lambda: s["odd"], lambda: s.fork(2), lambda: s.lane.submit("more")):
        with pytest.raises(ProgramError, match="odd"):
            use()
    return "done"


def test_a_state_that_failed_answers_and_never_hangs() -> None:
    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(ProgramError, match="odd"):  # nobody repaired it, so the run has failed too
                await executor.run(ignoring)

    check(work())


def test_a_batch_keeps_every_result() -> None:
    async def work() -> None:
        async with executing() as executor:
            ended: list[int] = []
            arguments = [{"where": ["none", "body", "fork"][i % 3]} for i in range(9)]
            results = await executor.batch(failing, arguments, concurrency=4, progress=ended.append)
            assert ended == list(range(1, 10))
            for i, result in enumerate(results):
                assert isinstance(result, (Run, KeyError, ProgramError)[i % 3])

    check(work())


@sgl.function
def endless(s: Any) -> None:
    s += "a"
    forks = s.fork(3)
    forks += sgl.gen("x", max_tokens=180, temperature=0, ignore_eos=True)
    forks.join()
    s += sgl.gen("y", max_tokens=180, temperature=0, ignore_eos=True)


def test_a_deadline_and_a_cancellation_end_all_states() -> None:
    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(DeadlineExceeded):
                await executor.run(endless, within=Limits(seconds=0.05))
            await until(lambda: is_empty(executor.engine))
            task = asyncio.create_task(executor.run(endless))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: is_empty(executor.engine))
            async for _ in executor.stream(endless):
                break
            await until(lambda: is_empty(executor.engine))

    check(work())


WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("WHERE")


@sgl.function
def context(s: Any) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    before = WHERE.get()
    _ = s["x"]
    return before, WHERE.get()


def test_context_variables_reach_the_program() -> None:
    async def one(executor: ProgramExecutor, name: str) -> None:
        WHERE.set(name)
        assert (await executor.run(context)).value == (name, name)

    async def work() -> None:
        async with executing() as executor:
            await asyncio.gather(*(asyncio.create_task(one(executor, str(i))) for i in range(8)))

    check(work())


@sgl.function
def thinking(s: Any) -> None:
    s += sgl.user("Sure?")
    s += sgl.assistant("Well:" + sgl.separate_reasoning(sgl.gen("x", max_tokens=20, temperature=0), "deepseek-r1"))
    s += sgl.user("?")


def test_reasoning_is_split_off_and_what_stood_before_it_stays() -> None:
    """The stock interpreter drops "Well:", shows the raw text first and hangs when it streams."""

    async def work() -> None:
        async with executing(f":<think>Hm.</think>Yes{EOS}") as executor:
            run = await executor.run(thinking)
            assert (run["x"], run["x_reasoning_content"]) == ("Yes", "Hm.")
            assert run.text() == f"<｜User｜>Sure?<｜Assistant｜></think>Well:Yes{EOS}<｜User｜>?"
            assert run.state.messages()[1]["content"] == "Well:Yes"

    check(work())


def test_arguments_are_checked() -> None:
    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(RequestError, match="topics"):
                await executor.run(two_steps, topics="tea")
            with pytest.raises(RequestError, match="concurrency"):
                await executor.batch(two_steps, [], concurrency=0)

    check(work())
