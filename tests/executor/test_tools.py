"""Tools: declared, checked, timed, retried, run outside the loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from typing import Annotated, Any, Literal

import msgspec
import pytest
import sglang as sgl

from support.engine import core_of, finish
from support.executor import GEN, check, executing, run
from weft.backend.executor import Retry, Tool, ToolError, tool
from weft.backend.executor.outside import Outside
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.errors import ConfigError

WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("WHERE", default="nowhere")


class Place(msgspec.Struct):
    x: int
    y: int = 0


@tool(timeout=5)
def move(
    to: Place,
    how: Annotated[Literal["fast", "slow"], msgspec.Meta(description="The speed.")] = "slow",
    *,
    times: int = 1,
) -> list[int]:
    """Go somewhere."""
    return [to.x * times, to.y * times]


def call(own: Tool, /, **arguments: Any) -> Any:
    outside = Outside()
    try:
        return asyncio.run(own.run(arguments, outside))
    finally:
        outside.close()


def test_a_tool_is_declared_from_its_signature() -> None:
    function = move.declared["function"]
    assert (function["name"], function["description"]) == ("move", "Go somewhere.")
    schema = function["parameters"]
    assert schema["required"] == ["to"] and schema["additionalProperties"] is False
    assert schema["properties"]["how"]["enum"] == ["fast", "slow"]
    assert schema["properties"]["how"]["description"] == "The speed."
    assert schema["$defs"]["Place"]["required"] == ["x"]
    assert move(Place(1, 2)) == [1, 2]  # still the function


def test_arguments_are_converted_and_checked() -> None:
    assert call(move, to={"x": 2}, times=3) == [6, 0]
    for wrong in ({}, {"to": {"x": "2"}}, {"to": {"x": 1}, "how": "late"}, {"to": {"x": 1}, "where": 1}):
        with pytest.raises(ToolError, match="wrong arguments") as caught:
            call(move, **wrong)
        assert caught.value.attempts == 0


def test_a_declaration_that_cannot_work_is_refused() -> None:
    def bare(x) -> None:  # type: ignore[no-untyped-def]
        pass

    def many(*x: int) -> None:
        pass

    for wrong in (bare, many):
        with pytest.raises(ConfigError, match="x"):
            tool(wrong)
    for options in ({"timeout": 0}, {"retry": Retry(0)}, {"retry": Retry(2)}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            tool(**options)(move.function)


def test_sync_tools_run_in_threads_and_async_ones_on_another_loop() -> None:
    where: dict[str, Any] = {}

    @tool
    def sync() -> None:
        where["sync"] = threading.get_ident(), WHERE.get()

    @tool
    async def coroutine() -> None:
        where["async"] = threading.get_ident(), WHERE.get()
        time.sleep(0.2)  # holds its own loop, not the programs'

    @sgl.function
    def program(s: Any) -> None:
        WHERE.set("here")
        s.call(sync)
        s.call(coroutine)

    async def work() -> None:
        async with executing() as executor:
            longest, last = 0.0, time.monotonic()
            task = asyncio.ensure_future(executor.run(program))
            while not task.done():
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            await task
            assert longest < 0.15
            assert {ident for ident, _ in where.values()}.isdisjoint({threading.get_ident()})
            assert [name for _, name in where.values()] == ["here", "here"]

    check(work())


def test_a_slow_tool_is_late_and_an_idempotent_one_is_tried_again() -> None:
    calls: list[str] = []

    async def slow(name: str) -> str:
        calls.append(name)
        if len(calls) < 3:
            await asyncio.sleep(5)
        return name

    with pytest.raises(ToolError, match=r"no result after 0.05 s") as caught:
        call(tool(timeout=0.05)(slow), name="a")
    assert isinstance(caught.value.__cause__, TimeoutError) and caught.value.arguments == {"name": "a"}
    calls.clear()
    assert call(tool(timeout=0.05, idempotent=True, retry=Retry(3, wait=0.01))(slow), name="b") == "b"
    assert calls == ["b"] * 3


def test_only_the_failures_of_a_policy_are_tried_again() -> None:
    calls: list[int] = []

    @tool(idempotent=True, retry=Retry(5, wait=0.0, on=(OSError,)))
    def broken() -> None:
        calls.append(1)
        raise OSError("away") if len(calls) < 3 else LookupError("gone")

    with pytest.raises(ToolError, match="LookupError: gone") as caught:
        call(broken)
    assert caught.value.attempts == len(calls) == 3


def test_a_tool_that_never_ends_does_not_hold_anything_up() -> None:
    """Its thread cannot be stopped; it is a daemon, and its result is dropped."""
    release = threading.Event()

    @tool(timeout=0.05)
    def stuck() -> None:
        release.wait(30)

    @sgl.function
    def program(s: Any) -> Any:
        with pytest.raises(ToolError):
            s.call(stuck)
        s += "a" + sgl.gen("x", **GEN)
        return s["x"]

    assert run(program).value
    release.set()


def test_cancelling_a_run_cancels_its_tools() -> None:
    seen: list[str] = []

    @tool
    async def endless() -> None:
        seen.append("began")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    @sgl.function
    def program(s: Any) -> None:
        s.call(endless)

    async def work() -> None:
        async with executing() as executor:
            task = asyncio.ensure_future(executor.run(program))
            while not seen:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while len(seen) < 2:
                await asyncio.sleep(0.001)
            assert seen == ["began", "cancelled"]

    check(work())


# -- the KV of a state that waits --------------------------------------------------------------------------


def test_kv_is_leased_while_a_tool_runs_and_pressure_can_have_it() -> None:
    """One slot short: the state that waits for its tool loses its KV last, gets it back, and says the same."""
    pools = PoolSizes(tokens=2048, slots=2, context=1024, burst=256, page=16)
    pinned: list[bool] = []

    async def work(pools: PoolSizes | None) -> str:
        options = {} if pools is None else {"pools": pools}
        async with executing(**options) as executor:  # type: ignore[arg-type]
            core, leave = core_of(executor.engine), asyncio.Event()

            async def wait() -> str:
                while not any(own.pinned > time.monotonic() for own in list(core.sequences.values())):
                    await asyncio.sleep(0.001)
                pinned.append(True)
                await leave.wait()
                return "done"

            waiting = Tool(wait, name="wait", description="", parameters={}, check=dict, here=True)

            @sgl.function
            def agent(s: Any) -> None:
                s += "A weaver " * 20 + sgl.gen("x", **GEN)
                s += s.call(waiting) + sgl.gen("y", **GEN)

            @sgl.function
            def other(s: Any, number: int) -> None:
                s += f"{number} others " * 10 + sgl.gen("x", **GEN)

            task = asyncio.ensure_future(executor.run(agent))
            while not pinned:
                await asyncio.sleep(0.001)
            await executor.batch(other, [{"number": n} for n in range(12)], concurrency=4)
            leave.set()
            ended = await task
            assert not any(own.pinned > time.monotonic() for own in core.sequences.values())
            return str(ended.text())

    roomy = finish(work(None))
    pinned.clear()
    assert finish(work(pools)) == roomy
    assert pinned == [True]


def test_what_was_said_is_computed_while_the_program_waits() -> None:
    text = "A weaver and a loom. " * 30

    @tool
    async def slow() -> None:
        await asyncio.sleep(0.5)

    @sgl.function
    def waiting(s: Any, waits: bool) -> Any:
        s += text
        if waits:
            s.call(slow)
        s += "And " + sgl.gen("x", **GEN)
        return s.get_meta_info("x")["cached_tokens"]

    ahead, plain = run(waiting, True), run(waiting, False)
    assert ahead.text() == plain.text()
    assert plain.value == 0 and len(text) - 8 <= ahead.value <= len(text) + 1
