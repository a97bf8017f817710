"""The programs answer, on the model that comes with Weft."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from support.programs import guarded
from weft.backend.language import DeepSeekV4Backend
from weft.programs.extraction import extraction
from weft.programs.fork_and_judge import fork_and_judge
from weft.programs.tool_agent import tool_agent
from weft.runtime.embedded.dialogue import tool
from weft.runtime.engine.front import Engine

TOOLS = [
    tool("get_boss", "Look up the boss.", "name"),
    tool("get_room", "Get the room.", "name"),
    tool("calculator", "Compute.", "expression"),
]
KNOWN = {"get_boss": {"Malles": "Tolkar"}, "get_room": {"Tolkar": "423"}}


@pytest.fixture(scope="module")
def backend() -> Iterator[DeepSeekV4Backend]:
    with Engine.embedded() as engine:
        own = DeepSeekV4Backend(engine)
        yield own
        own.shutdown()


def outcome(program: Any, backend: DeepSeekV4Backend, **arguments: Any) -> Any:
    state = guarded(lambda: program.run(backend=backend, **arguments))
    assert state.error() is None
    return state


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    if name == "calculator":
        left, sign, right = arguments["expression"].split()
        assert sign == "+"
        return str(int(left) + int(right))
    return KNOWN[name].get(arguments["name"], "error: not found")


def test_an_agent_calls_one_tool_after_another(backend: DeepSeekV4Backend) -> None:
    question = "What is the room of the boss of Malles? Then add 5."
    state = outcome(tool_agent, backend, question=question, tools=TOOLS, run=run_tool)
    assert state["answer"] == "428"
    assert state["calls"] == [
        ["get_boss", {"name": "Malles"}, "Tolkar"],
        ["get_room", {"name": "Tolkar"}, "423"],
        ["calculator", {"expression": "423 + 5"}, "428"],
    ]
    assert state.get_meta_info("turn 4")["cached_tokens"] > 0.8 * state.get_meta_info("turn 4")["prompt_tokens"]


def test_an_agent_ends_after_so_many_calls(backend: DeepSeekV4Backend) -> None:
    question = "What is the room of the boss of Malles?"
    state = outcome(tool_agent, backend, question=question, tools=TOOLS, run=run_tool, most=0)
    assert state["answer"] is None and len(state["calls"]) == 1


def test_a_judge_picks_among_answers(backend: DeepSeekV4Backend) -> None:
    facts = "The city of Karkes is Ponlos. For Vommas the city is Lumlus. The room of Vommas is 118."
    random.seed(1)  # the seeds of what is drawn, in whatever order
    arguments = {"facts": facts, "attribute": "city", "name": "Vommas", "width": 8}
    state = outcome(fork_and_judge, backend, **arguments, temperature=2.0)
    assert state["answer"] == "Lumlus" and len(state["answers"]) == len(state["verdicts"]) == 8
    judged = dict(zip(state["answers"], state["verdicts"], strict=True))
    assert judged["Lumlus"] == max(judged.values()) > 0
    assert outcome(fork_and_judge, backend, **arguments, temperature=0)["answers"] == ["Lumlus"] * 8


def test_a_record_is_read_once(backend: DeepSeekV4Backend) -> None:
    record = {"name": "Rorna", "city": "Besnim", "seat": 556, "color": "blue", "ship": "Gunsis"}
    fields = ["seat", "city", "color", "ship"]
    state = outcome(extraction, backend, record=record, fields=fields)
    assert state["found"] == {"seat": "556", "city": "Besnim", "color": "blue", "ship": "Gunsis"}
    for field in fields[1:]:
        assert state.get_meta_info(field)["computed_tokens"] < 25
