"""Programs in JSON: a list of steps, each an object whose `do` says what it does. Bounded on sight: so many steps,
so deep, loops so long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from weft.runtime.errors import RequestError

MOST_STEPS = 1000  # written
MOST_RUN = 10_000  # done, loops counted out
MOST_DEPTH = 16
MOST_BRANCHES = 64
MOST_TURNS = 1000  # of one loop
NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
Name = Annotated[str, msgspec.Meta(pattern=NAME)]
Turns = Annotated[int, msgspec.Meta(ge=1, le=MOST_TURNS)]
Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=256)]


class _Step(msgspec.Struct, tag_field="do", forbid_unknown_fields=True, kw_only=True):
    pass


class Text(_Step, tag="text"):
    """Append text. `{name}` stands for a variable or an argument, `{{` for a brace."""

    text: str


class Role(_Step, tag="role"):
    role: Literal["system", "user", "assistant"]
    steps: list[Step]


class Gen(_Step, tag="gen"):
    """Draw text, as variable `name`."""

    name: Name
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 128
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | None = None
    dtype: Literal["int", "float", "str", "bool"] | None = None


class Select(_Step, tag="select"):
    """Append the likeliest of the choices, as variable `name`."""

    name: Name
    choices: Texts


Branches = Annotated[list["list[Step]"], msgspec.Meta(min_length=1, max_length=MOST_BRANCHES)]


class Fork(_Step, tag="fork"):
    """Go on in several ways at the same time. join: of what they say, nothing is kept but their variables, each as
    a list (`variables`), or all text is appended as well (`text`)."""

    branches: Branches
    join: Literal["variables", "text"] = "variables"


class Race(_Step, tag="race"):
    """Go on with the first of several ways to come to its end; the others are cancelled."""

    branches: Branches


class Loop(_Step, tag="loop"):
    """Once for each item of a list, or of the variable or argument of that name. `index` is set beside `item`."""

    over: list[Any] | Name
    steps: list[Step]
    item: Name = "item"
    most: Turns = 100


class While(_Step, tag="while"):
    """As long as a variable is as said, at most so often; one that is not set is nothing."""

    variable: Name
    most: Turns
    steps: list[Step]
    equals: Any = msgspec.UNSET
    differs: Any = msgspec.UNSET
    contains: str | msgspec.UnsetType = msgspec.UNSET
    lacks: str | msgspec.UnsetType = msgspec.UNSET


class Call(_Step, tag="tool"):
    """Call one of the operator's tools; its result is variable `name`. Texts among the arguments are filled in."""

    name: Name
    tool: str
    arguments: dict[str, Any] = {}


class Set(_Step, tag="set"):
    name: Name
    value: Any


Step = Text | Role | Gen | Select | Fork | Race | Loop | While | Call | Set


class Inline(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """name: what it is called in receipts and errors."""

    steps: list[Step]
    name: Name = "inline"


def nested(step: Step) -> Iterator[tuple[str, list[Step]]]:
    match step:
        case Fork() | Race():
            for i, branch in enumerate(step.branches):
                yield f"branches[{i}]", branch
        case Role() | Loop() | While():
            yield "steps", step.steps


def check(program: Inline) -> None:
    """Raises `RequestError` for a program that is too large or too deep, or a loop without a condition."""
    count = 0

    def look(steps: list[Step], where: str, depth: int, role: bool) -> None:
        nonlocal count
        if depth > MOST_DEPTH:
            raise RequestError(where, depth, f"steps are at most {MOST_DEPTH} deep")
        count += len(steps)
        if count > MOST_STEPS:
            raise RequestError(where, count, f"at most {MOST_STEPS} steps")
        for i, step in enumerate(steps):
            at = f"{where}[{i}]"
            if role and isinstance(step, Role):
                raise RequestError(at, step.role, "roles do not nest")
            if isinstance(step, While):
                given = [n for n in ("equals", "differs", "contains", "lacks") if _is_set(getattr(step, n))]
                if len(given) != 1:
                    raise RequestError(at, given, "one of equals, differs, contains and lacks")
            for name, inner in nested(step):
                look(inner, f"{at}.{name}", depth + 1, role or isinstance(step, Role))

    look(program.steps, "program.steps", 1, False)


def _is_set(value: Any) -> bool:
    return value is not msgspec.UNSET
