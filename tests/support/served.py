"""Programs and tools that test gateways serve."""

from __future__ import annotations

import time
from typing import Any, Literal

import sglang as sgl

from weft.backend.executor import Toolbox, tool

PEOPLE = {"Tolkar": "423", "Malles": "118", "Vommas": "77"}


@tool
def get_room(name: str) -> str:
    """Get the room of a person."""
    return PEOPLE.get(name, "unknown")


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def fails(why: str) -> str:
    """Always fails."""
    raise RuntimeError(why)


@sgl.function
def ask(s: Any, question: str, mood: Literal["short", "long"] = "short", tokens: int = 16) -> str:
    """Answer a question."""
    s += sgl.system("Answer with the value only.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=tokens, temperature=0))
    return f"{mood}: {s['answer']}"


@sgl.function
def shared(s: Any, facts: str, names: list[str]) -> None:
    """The room of each, side by side."""
    s += sgl.system(facts)
    parts = s.fork(len(names))
    for part, name in zip(parts, names, strict=True):
        part += sgl.user(f"What is the room of {name}?")
        part += sgl.assistant(sgl.gen("room", max_tokens=8, temperature=0))
    parts.join()
    s += sgl.user("Is the first one 423?") + sgl.assistant(sgl.select("verdict", ["yes", "no"]))


@sgl.function
def endless(s: Any, tokens: int = 4000) -> None:
    """Draws for long."""
    s += sgl.user("Say something.") + sgl.assistant(sgl.gen("text", max_tokens=tokens, ignore_eos=True))


@sgl.function
def failing(s: Any, after: bool = False) -> None:
    """Fails in its own code, perhaps behind a tool."""
    s += sgl.user("x") + sgl.assistant(sgl.gen("x", max_tokens=2))
    if after:
        s.call(add, a=1, b=2)
    raise LookupError("nothing here")


@sgl.function
def patient(s: Any, seconds: float) -> None:
    """Waits for a tool."""

    @tool
    def nap() -> str:
        time.sleep(seconds)
        return "awake"

    s += sgl.user("x") + sgl.assistant(sgl.gen("x", max_tokens=2))
    s.set_var("nap", s.call(nap))


@sgl.function
def with_tools(s: Any, question: str) -> str:
    """An assistant that may call tools."""
    box = Toolbox(get_room, add)
    s += sgl.system(box.text)
    s += sgl.user(question)
    turn = s.turn("turn", box, max_tokens=96, temperature=0)
    if turn.results:
        turn = s.turn("answer", box, max_tokens=32, temperature=0)
    return str(turn.content)
