"""Fields of JSON and cells of tables."""

from __future__ import annotations

import json

from weft.runtime.embedded.dialogue import Dialogue
from weft.runtime.embedded.tasks.facts import HELD_QUESTIONS, QUESTIONS, Fact, cost, follow_up
from weft.runtime.embedded.words import NUMBERED, Draw

_OF_ONE = (
    "What is the {a}?",
    "Give the {a}.",
    "Tell me the {a}.",
    "I need the {a}.",
    "{a}?",
    "Find the {a}.",
    "Please tell me the {a}.",
    "Say what the {a} is.",
    "Please find the {a}.",
)
_HELD_OF_ONE = ("Please give me the {a}.", "Tell me what the {a} is.", "Which {a}?")
_JSON = ("", "JSON:\n", "Here is a record:\n", "Read this JSON:\n", "Use this record.\n")
_HELD_JSON = ("Read this record:\n", "Here is JSON:\n")
_TABLE = ("", "Table:\n", "Here is a table:\n", "Read this table:\n", "Use this table.\n")
_HELD_TABLE = ("Read the table:\n", "Here is this table:\n")


def json_extract(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    keys = draw.attributes(draw.rng.randint(2, 5))
    asked = _asked(draw, tokens)
    if tokens is None and draw.chance(0.5):
        record = {"name": draw.name()} | {key: draw.value(key) for key in draw.attributes(draw.rng.randint(2, 7))}
        d.context(draw.phrase(_JSON, _HELD_JSON) + _json(draw, record))
        _questions(d, [Fact("", key, value) for key, value in record.items()], _OF_ONE, _HELD_OF_ONE, asked)
        return
    rows = _rows(draw, keys, tokens and tokens - 22 * asked, 3)
    lines = ",\n".join(_json(draw, row) for row in rows)
    d.context(f"{draw.phrase(_JSON, _HELD_JSON)}[{lines}]")
    _questions(d, _cells(rows), QUESTIONS, HELD_QUESTIONS, asked)


def table_extract(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    asked = _asked(draw, tokens)
    rows = _rows(draw, draw.attributes(draw.rng.randint(1, 4)), tokens and tokens - 22 * asked, 1)
    bar = draw.phrase((" | ", "|"), (" | ",))
    lines = [bar.join(rows[0]), *(bar.join(row.values()) for row in rows)]
    d.context(draw.phrase(_TABLE, _HELD_TABLE) + "\n".join(lines))
    _questions(d, _cells(rows), QUESTIONS, HELD_QUESTIONS, asked)


def _rows(draw: Draw, keys: list[str], tokens: int | None, around: int) -> list[dict[str, str]]:
    """around: tokens beside each value."""
    count = draw.rng.randint(2, 5)
    rows: list[dict[str, str]] = []
    room = (tokens or 0) - 40
    while len(rows) < count or room > 0:
        rows.append({"name": draw.name()} | {key: draw.value(key) for key in keys})
        room -= sum(cost(value) + around for value in rows[-1].values())
    return rows


def _json(draw: Draw, record: dict[str, str]) -> str:
    """Numbers as numbers."""
    return json.dumps({key: int(value) if key in NUMBERED else value for key, value in record.items()})


def _cells(rows: list[dict[str, str]]) -> list[Fact]:
    return [Fact(row["name"], key, row[key]) for row in rows for key in row if key != "name"]


def _asked(draw: Draw, tokens: int | None) -> int:
    """How many questions: more about a long text, or little of it would be learned from."""
    return draw.rng.choice((1, 2, 2, 3, 4)) if tokens is None else draw.rng.randint(1, 2 + min(tokens // 200, 6))


def _questions(d: Dialogue, cells: list[Fact], train: tuple[str, ...], held: tuple[str, ...], asked: int) -> None:
    draw = d.draw
    for cell in draw.rng.sample(cells, min(len(cells), asked)):
        where = f"The {cell.attribute} of {cell.name} is" if cell.name else f"The {cell.attribute} is"
        text = draw.phrase(train, held).format(a=cell.attribute, x=cell.name)
        d.ask(text, cell.value, f"{where} {cell.value}.")
        if draw.chance(0.15):
            others = [other.value for other in cells if other.attribute == cell.attribute]
            follow_up(d, cell, others or [cell.value])
