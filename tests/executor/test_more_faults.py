"""What sglang's interpreter gets wrong, and what the executor does in its place: nineteen faults, each of which
was reproduced there on 0.5.2 and 0.5.23. The second part."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from typing import Any

import pytest
import sglang as sgl

from support.executor import GEN, check, executing, run, settled
from weft.backend.executor import Limits, Piece, ProgramError, ProgramExecutor, Run
from weft.runtime.errors import RequestError
from weft.runtime.text.tokens import EOS

LONG: dict[str, Any] = {"max_tokens": 120, "temperature": 0, "ignore_eos": True}


@sgl.function
def failing(s: Any, where: str) -> Any:
    s += "a"
    forks = s.fork(3)
    for i, fork in enumerate(forks):
        fork += sgl.gen("x", **GEN) if i != 1 else sgl.gen("odd", temperature=-1)
    forks.join()


@sgl.function
def long(s: Any) -> None:
    s += "a" + sgl.gen("x", **LONG) + sgl.gen("y", **LONG)


@sgl.function
async def awaiting(s: Any) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    await asyncio.sleep(0)
    return s["x"]


def test_8_async_programs_run_and_streams_do_not_wait_for_each_other() -> None:
    async def first_piece(executor: ProgramExecutor, program: Any) -> float:
        began = time.monotonic()
        async for item in executor.stream(program):
            if isinstance(item, Piece):
                return time.monotonic() - began
        raise AssertionError("no piece")

    async def work() -> None:
        async with executing() as executor:
            assert len((await executor.run(awaiting)).value) > 0
            before = threading.active_count()
            await asyncio.gather(*(first_piece(executor, long) for _ in range(16)))
            assert threading.active_count() == before  # no thread is parked for any of them

    check(work())


@sgl.function
def late(s: Any, event: asyncio.Event) -> None:
    s += "a" + sgl.gen("x", **GEN)
    s.call(_waiting(event))
    s += sgl.gen("y", **GEN)


def _waiting(event: asyncio.Event) -> Any:
    from weft.backend.executor import Tool

    async def wait() -> None:
        await event.wait()

    return Tool(wait, name="wait", description="", parameters={}, check=dict, here=True)


def test_9_waiting_for_pieces_costs_nothing() -> None:
    async def work() -> None:
        async with executing() as executor:
            event, turns = asyncio.Event(), 0
            pieces = aiter(executor.stream(late, event))
            while (await anext(pieces)).meta["finish_reason"] is None:  # type: ignore[union-attr, index]
                pass
            following = asyncio.ensure_future(anext(pieces))
            spent = time.thread_time()
            for _ in range(50):  # the loop is free, and nothing spins on it
                await asyncio.sleep(0.002)
                turns += 1
            assert time.thread_time() - spent < 0.05 and not following.done() and turns == 50
            event.set()
            assert isinstance(await following, Piece)
            async for _ in pieces:
                pass

    check(work())


def test_10_every_piece_comes_with_its_meta_data() -> None:
    @sgl.function
    def scored(s: Any) -> None:
        s += "a" + sgl.gen("x", **LONG, return_logprob=True)

    async def work() -> None:
        async with executing() as executor:
            pieces = [item async for item in executor.stream(scored) if isinstance(item, Piece)]
            await asyncio.sleep(0)
            entries = [len(piece.meta["output_token_logprobs"]) for piece in pieces]  # type: ignore[index]
            assert entries == sorted(entries) and entries[-1] == 120
            assert len(set(entries)) > 60  # as drawn: a step's tokens, not what a reader happened to find

    check(work())


@sgl.function
def at_once(s: Any) -> None:
    s += "A story of a weaver, a loom and a thread that was too long for its bobbin. " * 3
    forks = s.fork(4)
    forks += lambda i: f"{i}" + sgl.gen("x", **GEN)
    forks.join()


def test_11_a_fork_shares_what_was_said_just_before_it() -> None:
    ended = run(at_once)
    prompt = len(("A story of a weaver, a loom and a thread that was too long for its bobbin. " * 3).encode()) + 1
    assert prompt <= ended.cost.computed < prompt + 4 * 12  # once, and what each child adds
    assert ended.cost.generations == 4


@sgl.function
def inherits(s: Any) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    forks = s.fork(2)
    assert len(forks) == 2
    metas = [fork.get_meta_info("x")["completion_tokens"] for fork in forks]
    with s.copy() as copy:
        copy += sgl.gen("y", **GEN)
        mine = copy["y"]
    with pytest.raises(RequestError, match="position_ids_offset"):
        s.fork(2, position_ids_offset=[0, 5])
    return metas, mine


def test_12_forks_have_a_length_meta_data_and_no_silent_options() -> None:
    ended = run(inherits)
    metas, mine = ended.value
    assert metas == [8, 8] and ended["y"] == [mine]


def test_13_a_callers_stop_list_stays_as_it_is() -> None:
    stops = ["\n", "#"]

    @sgl.function
    def stopping(s: Any, stop: Any) -> None:
        s += sgl.user("a") + sgl.assistant(sgl.gen("x", **GEN, stop=stop))

    run(stopping, stops)
    assert stops == ["\n", "#"]
    assert run(stopping, ("\n",))["x"] == run(stopping, ["\n"])["x"]


@sgl.function
def thinking(s: Any) -> None:
    s += sgl.user("Sure?")
    both = sgl.gen("x", max_tokens=20, temperature=0) + EOS + sgl.user("!") + "Well:" + sgl.gen("y", max_tokens=20)
    s += sgl.assistant("Well:" + sgl.separate_reasoning(both, "deepseek-r1"))


def test_14_reasoning_is_split_off_while_streaming_too() -> None:
    """Once more, with one generation, in `test_executor.py`: what stands before it stays."""

    async def work() -> None:
        async with executing(f":<think>Hm.</think>Yes{EOS}") as executor:

            @sgl.function
            def once(s: Any) -> None:
                s += "Well:" + sgl.separate_reasoning(sgl.gen("x", max_tokens=20, temperature=0), "deepseek-r1")

            async for item in executor.stream(once):
                last = item
            assert isinstance(last, Run)
            assert (last["x"], last["x_reasoning_content"], last.text()) == ("Yes", "Hm.", "Well:Yes")

    check(work())


@sgl.function
def twice(s: Any) -> Any:
    s += "a" + sgl.gen("x", max_tokens=3, temperature=0)
    first = s["x"]
    s += "b" + sgl.gen("x", max_tokens=5, temperature=0)
    return first, s["x"]


def test_15_a_name_used_twice_means_the_last() -> None:
    ended = run(twice)
    first, second = ended.value
    assert first != second == ended["x"] and ended.text() == f"a{first}b{second}"


TABLE = {"a": "1", "b": "2"}
CALLS: list[str] = []


@sgl.function
def looks_up(s: Any, key: str) -> None:
    CALLS.append(key)
    with s.var_scope("all"):
        s += TABLE[key] + sgl.gen("x", **GEN)


def test_16_user_code_is_run_once_with_its_own_arguments() -> None:
    CALLS.clear()

    async def work() -> None:
        async with executing() as executor:
            results = await executor.batch(looks_up, [{"key": "a"}, {"key": "b"}])
            assert [type(result) for result in results] == [Run, Run]
            assert sorted(CALLS) == ["a", "b"]

    check(work())


WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("WHERE")


@sgl.function
def contextual(s: Any) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    _ = s["x"]
    seen = s.gather(lambda b: WHERE.get(), lambda b: WHERE.get())
    return [WHERE.get(), *(branch.value for branch in seen)]


def test_17_context_variables_reach_programs_forks_and_batches() -> None:
    async def work() -> None:
        WHERE.set("here")
        async with executing() as executor:
            async for item in executor.stream(contextual):
                last = item
            assert isinstance(last, Run) and last.value == ["here"] * 3
            (ended,) = await executor.batch(contextual, [{}])
            assert isinstance(ended, Run) and ended.value == ["here"] * 3

    check(work())


def test_18_one_way_to_run_for_forks_streams_and_errors() -> None:
    """sglang has two, and neither does all three."""

    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(ProgramError, match="odd"):
                async for _ in executor.stream(failing, "fork"):
                    pass
            await settled()

    check(work())


@sgl.function
def selecting(s: Any) -> Any:
    s += "Pick " + sgl.select("x", ["aa", "bb"])
    forks = s.fork(2)
    forks += lambda i: f" {i}" + sgl.gen("y", dtype=int, stop="7", max_tokens=6)
    forks.join("concate_and_append")
    s += sgl.gen("z", **GEN)


def test_19_what_its_endpoint_cannot_do() -> None:
    """dtype with a stop, and joins of texts, both in one program."""
    ended = run(selecting)
    assert ended["x"] in ("aa", "bb") and len(ended["z"]) > 0 and " 0" in ended.text() and " 1" in ended.text()
    with pytest.raises(ProgramError, match="temperature"):
        run(_hot)


@sgl.function
def _hot(s: Any) -> None:
    s += "Pick " + sgl.select("x", ["aa", "bb"], temperature=0.5)


def test_a_deadline_ends_a_program_that_only_waits() -> None:
    @sgl.function
    async def sleeping(s: Any) -> None:
        await asyncio.sleep(60)

    with pytest.raises(Exception, match="deadline"):
        run(sleeping, within=Limits(seconds=0.05))
