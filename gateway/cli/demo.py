"""`weft demo`: three programs on the embedded model, what they answer and what that took."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.backend.executor import ProgramExecutor
from weft.gateway.cli.run import load_program
from weft.runtime.engine.front import Engine

_BOSSES = {"Malles": "Tolkar", "Rornal": "Vommas"}
_ROOMS = {"Tolkar": "423", "Vommas": "118"}
_FACTS = (
    "The city of Karkes is Ponlos. Susfem: room 926. For Vommas the city is Lumlus. Vommas has the pet goat. "
    "Note: the city of Tinasor is Gangor. The room of Vommas is 118."
)
_RECORD = {"name": "Rorna", "city": "Besnim", "seat": 556, "color": "blue", "ship": "Gunsis"}


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    started = time.perf_counter()
    with Engine.embedded() as engine:
        console.print(
            f"embedded model ({engine.model_config.num_hidden_layers} layers, FP8/FP4) loaded in "
            f"{time.perf_counter() - started:.1f} s; {engine.capacity.line()}"
        )
        with ProgramExecutor(engine) as executor:
            for name, arguments, results in _programs():
                _show(console, executor, name, arguments, results)
    return 0


def _programs() -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, arguments, and the variables to show. Named, not imported: the programs stand above the gateway."""
    question = "What is the room of the boss of Malles? Then add 5."
    return [
        ("tool_agent", {"question": question, "tools": _tools(), "run": _run_tool}, ("calls", "answer")),
        (
            "fork_and_judge",  # hot enough for some answers to be wrong
            {"facts": _FACTS, "attribute": "city", "name": "Vommas", "temperature": 1.6},
            ("answers", "verdicts", "answer"),
        ),
        ("extraction", {"record": _RECORD, "fields": ["seat", "city", "color", "ship"]}, ("found",)),
    ]


def _tools() -> list[dict[str, Any]]:
    return [
        _tool("get_boss", "Look up the boss.", "name"),
        _tool("get_room", "Get the room.", "name"),
        _tool("calculator", "Compute.", "expression"),
    ]


def _tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def _run_tool(name: str, arguments: dict[str, Any]) -> str:
    if name == "calculator":
        left, sign, right = str(arguments.get("expression")).split(" ")
        return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)))
    known = {"get_boss": _BOSSES, "get_room": _ROOMS}.get(name, {})
    return known.get(str(arguments.get("name")), "error: not found")


def _show(
    console: Console, executor: ProgramExecutor, name: str, arguments: dict[str, Any], results: tuple[str, ...]
) -> None:
    started = time.perf_counter()
    ended = asyncio.run(executor.run(load_program(f"weft.programs.{name}:{name}"), **arguments))
    seconds = time.perf_counter() - started
    console.rule(name)
    for key, value in arguments.items():
        if isinstance(value, (str, dict, float)):
            console.print(f"{key}: {value}", markup=False, soft_wrap=True)
    for result in results:
        console.print(f"-> {result}: {ended[result]}", markup=False, soft_wrap=True)
    cost = ended.cost
    table = Table("generations", "prompt tokens", "from KV", "computed", "generated", "seconds")
    sums = (cost.generations, cost.prompt, cost.cached, cost.computed, cost.generated)
    table.add_row(*map(str, sums), f"{seconds:.2f}")
    console.print(table)
