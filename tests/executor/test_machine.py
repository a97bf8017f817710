"""Random programs: the executor's results are those of an interpreter that does one thing after another.

Forks in forks, parts side by side, races, tools, failures caught and not; several runs at a time, some of them
cancelled or late. Every run ends, and nothing is left of it in the engine or on the loop.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import sglang as sgl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.engine import finish, is_empty, until
from support.plain import Odd, Plain
from support.programs import shared_engine
from weft.backend.executor import Attempts, Limits, ProgramError, ProgramExecutor, tool
from weft.runtime.engine.front import Engine
from weft.runtime.errors import DeadlineExceeded

Node = tuple[Any, ...]
CHOICES = ["one", "two!", "3"]


@tool
async def echo(text: str) -> str:
    await asyncio.sleep(0.001)
    return f"[{text}]"


@tool
def shout(text: str) -> str:
    return text.upper()


# -- programs ----------------------------------------------------------------------------------------------

_names = st.sampled_from("uvwxyz")
_simple = st.one_of(
    st.tuples(st.just("text"), st.sampled_from(["a", " of", "\n", "weave ", "<", "é", "0" * 40])),
    st.tuples(st.just("gen"), _names, st.integers(1, 9)),
    st.tuples(st.just("gen"), _names, st.integers(1, 9)),
    st.tuples(st.just("select"), _names),
    st.tuples(st.just("read"), _names),
    st.tuples(st.just("tool"), st.sampled_from([echo, shout]), st.sampled_from(["x", "why"])),
    st.tuples(st.just("again"), _names, st.integers(0, 2)),
    st.tuples(st.just("scope"), _names),
)


def _nested(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    block = st.lists(inner, max_size=4)
    blocks = st.lists(block, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("fork"), blocks, st.sampled_from(["gather_variable", "concate_and_append"])),
        st.tuples(st.just("parts"), blocks, st.booleans()),
        st.tuples(st.just("race"), block, st.sampled_from(["gen", "body"])),
        st.tuples(st.just("become"), block),
        st.tuples(st.just("catch"), block, st.sampled_from(["gen", "body", "none"])),
    )


programs = st.tuples(
    st.lists(st.recursive(_simple, _nested, max_leaves=14), max_size=7),
    st.sampled_from(["none"] * 3 + ["gen", "body"]),
)


class Broken(Exception):
    """What a program's own code raises."""


def perform(s: Any, block: list[Node]) -> None:
    for node in block:
        match node:
            case ("text", text):
                s += text
            case ("gen", name, count):
                s += sgl.gen(name, max_tokens=count, temperature=0)
            case ("select", name):
                s += sgl.select(name, CHOICES)
            case ("read", name):
                try:
                    s += f"({s[name]})"
                except KeyError:
                    s += "(none)"
            case ("tool", own, text):
                s += s.call(own, text=text)
            case ("again", name, failures):
                s.attempt(
                    sgl.gen(name, max_tokens=4, temperature=0), _failing(failures), Attempts(3, temperature=0)
                )
            case ("scope", name):
                with s.var_scope(name):
                    s += "in" + sgl.gen("inner", max_tokens=2, temperature=0)
            case ("fork", blocks, mode):
                group = s.fork(len(blocks))
                for child, own in zip(group, blocks, strict=True):
                    perform(child, own)
                group.join(mode)
            case ("parts", blocks, fresh):
                parts = s.gather(*(partial(perform, block=own) for own in blocks), fresh=fresh)
                s += "".join(sorted(str(sorted(map(str, part.state.lane.variables))) for part in parts))
            case ("race", good, how):
                won = s.race(partial(fail, how=how), partial(perform, block=good))
                s += won.state.text()[-3:]
            case ("become", own):
                part = s.gather(partial(perform, block=own), keep=True)[0]
                s.become(part.state)
            case ("catch", own, how):
                try:
                    s.gather(partial(fails_behind, block=own, how=how))
                except ProgramError as error:
                    s += f"{{{error.variable}}}"
            case ("fail", how):
                fail(s, how)


def fail(s: Any, how: str) -> None:
    if how == "gen":
        s += sgl.gen("odd", temperature=-1)
        s.sync()
    elif how == "body":
        raise Broken


def fails_behind(s: Any, block: list[Node], how: str) -> None:
    perform(s, block)
    fail(s, how)


def _failing(times: int) -> Any:
    left = [times]

    def check(_: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("not yet")

    return check


# -- one thing after another -------------------------------------------------------------------------------


async def follow(s: Plain, block: list[Node]) -> None:
    for node in block:
        match node:
            case ("text", text):
                s.add(text)
            case ("gen", name, count):
                await s.gen(name, count)
            case ("select", name):
                await s.select(name, CHOICES)
            case ("read", name):
                s.add(f"({s.variables[name]})" if name in s.variables else "(none)")
            case ("tool", own, text):
                s.add(f"[{text}]" if own is echo else text.upper())
            case ("again", name, _):
                await s.gen(name, 4)
            case ("scope", name):
                start = len(s.text)
                s.add("in")
                await s.gen("inner", 2)
                s.variables[name] = s.text[start:]
            case ("fork", blocks, mode):
                parts, length, before = len(s.parts), len(s.text), set(s.variables)
                for child in await _each(s, blocks):
                    if mode == "concate_and_append":
                        s.parts += child.parts[parts:]
                        s.text += child.text[length:]
                    else:
                        for name in child.variables.keys() - before:
                            s.variables.setdefault(name, []).append(child.variables[name])
            case ("parts", blocks, fresh):
                children = await _each(Plain(s.engine) if fresh else s, blocks)
                s.add("".join(sorted(str(sorted(map(str, child.variables))) for child in children)))
            case ("race", good, _):
                (child,) = await _each(s, [good])
                s.add(child.text[-3:])
            case ("become", own):
                (child,) = await _each(s, [own])
                s.parts, s.text, s.variables = child.parts, child.text, child.variables
            case ("catch", own, how):
                try:
                    await _each(s, [[*own, ("fail", how)]])
                except Odd as error:
                    s.add(f"{{{error.variable}}}")
            case ("differs",):
                s.add("!")
            case ("fail", how) if how != "none":
                raise Odd("odd" if how == "gen" else None)


async def _each(s: Plain, blocks: list[list[Node]]) -> list[Plain]:
    children = []
    for block in blocks:
        child = s.fork()
        await follow(child, block)
        children.append(child)
    return children


# -- side by side ------------------------------------------------------------------------------------------


@sgl.function
def program(s: Any, block: Any, how: str) -> None:
    perform(s, block)
    fail(s, how)


async def outcome(work: Any) -> Any:
    """Text and variables, or the variable that failed it."""
    try:
        ended = await work
    except ProgramError as error:
        return error.variable
    except Broken:
        return None
    return ended.text(), ended.state.lane.variables


async def expected(engine: Engine, block: list[Node], how: str) -> Any:
    plain = Plain(engine)
    try:
        await follow(plain, [*block, ("fail", how)])
    except Odd as error:
        return error.variable
    return plain.text, plain.variables


async def side_by_side(block: list[Node], how: str, delays: list[float]) -> None:
    engine, before = shared_engine(), asyncio.all_tasks()
    wanted = await expected(engine, block, how)
    with ProgramExecutor(engine, stall=30) as executor:
        runs = [asyncio.ensure_future(outcome(executor.run(program, block, how))) for _ in range(2)]
        cancelled = [asyncio.ensure_future(executor.run(program, block, how)) for _ in delays]
        limits = [Limits(seconds=delay + 1e-4) for delay in delays]
        late = [asyncio.ensure_future(executor.run(program, block, how, within=own)) for own in limits]
        small = asyncio.ensure_future(executor.run(program, block, how, within=Limits(tokens=9)))
        for task, delay in zip(cancelled, delays, strict=True):
            asyncio.get_running_loop().call_later(delay, task.cancel)
        ends = await asyncio.wait_for(asyncio.gather(*cancelled, *late, small, return_exceptions=True), 30)
        for end in ends:
            if isinstance(end, BaseException):
                assert isinstance(end, asyncio.CancelledError | DeadlineExceeded | ProgramError | Broken), end
        assert await asyncio.wait_for(asyncio.gather(*runs), 30) == [wanted] * 2
        await until(lambda: is_empty(engine))
        assert asyncio.all_tasks() == before


DELAYS = st.lists(st.floats(0, 0.05), min_size=1, max_size=3)
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **QUIET)  # type: ignore[arg-type]
@given(programs, DELAYS)
def test_random_programs(own: Any, delays: list[float]) -> None:
    finish(side_by_side(*own, delays))


@pytest.mark.slow
@settings(max_examples=1500, **QUIET)  # type: ignore[arg-type]
@given(programs, DELAYS)
def test_many_random_programs(own: Any, delays: list[float]) -> None:
    finish(side_by_side(*own, delays))


def test_the_machine_sees_a_difference() -> None:
    block: list[Node] = [("gen", "u", 4), ("fork", [[("text", "a")], [("gen", "v", 3)]], "gather_variable")]
    with pytest.raises(AssertionError):
        finish(side_by_side([*block, ("differs",)], "none", [0.0]))
