"""Runs programs in JSON (`inline_types`) on a state of the executor: an interpreter of data, which evaluates
nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import sglang as sgl
from sglang.lang import ir

from weft.backend.executor import Tool, ToolError
from weft.gateway.runs.inline_types import (
    MOST_RUN,
    Call,
    Fork,
    Gen,
    Inline,
    Loop,
    Race,
    Role,
    Select,
    Set,
    Step,
    Text,
    While,
    check,
)
from weft.runtime.errors import BudgetExceeded, RequestError

_HOLE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)\}")
_LONGEST = 1 << 24  # characters that a program may make, read or compare, over all its steps
_VALUE = 16  # as so many characters a number or a list counts


def made_of(program: Inline, tools: Mapping[str, Tool]) -> ir.SglFunction:
    """An @sgl.function of the program, of the arguments it is run with. Raises `RequestError`."""
    check(program)

    def body(s: Any, arguments: Mapping[str, Any]) -> None:
        _Interpreter(tools, arguments).run(s, program.steps)

    body.__name__ = program.name
    return ir.SglFunction(body)


class _Interpreter:
    """One run. Its branches share the count of what was done: it runs on the event loop, where nothing of a
    client's may take long."""

    def __init__(self, tools: Mapping[str, Tool], arguments: Mapping[str, Any]) -> None:
        self._tools, self._arguments = tools, dict(arguments)
        self._done = self._said = 0

    def run(self, s: Any, steps: list[Step]) -> None:
        for step in steps:
            self._done += 1 + len(getattr(step, "branches", ()))
            if self._done > MOST_RUN:
                raise BudgetExceeded("steps", MOST_RUN, "a program does no more")
            self._step(s, step)

    def _step(self, s: Any, step: Step) -> None:
        match step:
            case Text():
                s += self._filled(s, step.text)
            case Role():
                with getattr(s, step.role)():
                    self.run(s, step.steps)
            case Gen():
                s += _gen(step)
            case Select():
                s += sgl.select(step.name, [self._filled(s, choice) for choice in step.choices])
            case Fork():
                self._fork(s, step)
            case Race():
                won = s.race(*(self._body(branch) for branch in step.branches), keep=True)
                s.become(won.state)
            case Loop():
                self._loop(s, step)
            case While():
                self._while(s, step)
            case Call():
                s.set_var(step.name, self._call(s, step))
            case Set():
                s.set_var(step.name, self._deep(s, step.value))

    def _body(self, steps: list[Step]) -> Any:
        return lambda branch: self.run(branch, steps)

    def _fork(self, s: Any, step: Fork) -> None:
        known = {name: value for name, value in s.lane.variables.items()}
        branches = s.gather(*(self._body(branch) for branch in step.branches), keep=True)
        names = dict.fromkeys(name for branch in branches for name in branch.state.lane.variables)
        for name in names:
            values = [branch.state.lane.variables.get(name) for branch in branches]
            if any(value is not known.get(name) for value in values):
                s.set_var(name, values)
        if step.join == "text":
            s.lane.submit(ir.SglConcateAndAppend([branch.state for branch in branches]))
            s.sync()
        for branch in branches:
            branch.close()

    def _loop(self, s: Any, step: Loop) -> None:
        items = step.over if isinstance(step.over, list) else self._value(s, step.over)
        if not isinstance(items, list):
            raise RequestError("over", step.over, f"is {type(items).__name__}, not a list")
        if len(items) > step.most:
            raise RequestError("over", len(items), f"the loop takes at most {step.most} items")
        for index, item in enumerate(items):
            s.set_var(step.item, item)
            s.set_var("index", index)
            self.run(s, step.steps)

    def _while(self, s: Any, step: While) -> None:
        for _ in range(step.most):
            if not self._holds(s, step):
                return
            self.run(s, step.steps)

    def _holds(self, s: Any, step: While) -> bool:
        value = self._value(s, step.variable, None)
        self._spend(_size(value))
        if step.equals is not msgspec.UNSET:
            return bool(value == step.equals)
        if step.differs is not msgspec.UNSET:
            return bool(value != step.differs)
        text = "" if value is None else _text(value)
        if step.contains is not msgspec.UNSET:
            return str(step.contains) in text
        return str(step.lacks) not in text

    def _call(self, s: Any, step: Call) -> Any:
        own = self._tools.get(step.tool)
        if own is None:
            raise ToolError(step.tool, {}, f"there is no such tool, only {', '.join(self._tools) or 'none'}", 0)
        return s.call(own, **{name: self._deep(s, value) for name, value in step.arguments.items()})

    # -- texts and values -------------------------------------------------------------------------------

    def _value(self, s: Any, name: str, *default: Any) -> Any:
        """A variable, or an argument."""
        s.lane.settle(name)
        if name in s.lane.variables:
            return s[name]
        if name in self._arguments or not default:
            if name not in self._arguments:
                raise RequestError("name", name, "there is no such variable or argument")
            return self._arguments[name]
        return default[0]

    def _deep(self, s: Any, value: Any) -> Any:
        self._spend(_VALUE)
        if isinstance(value, str):
            whole = _HOLE.fullmatch(value)
            if whole is not None and whole[1]:
                return self._at(s, whole[1])  # stays what it is
            return self._filled(s, value)
        if isinstance(value, list):
            return [self._deep(s, own) for own in value]
        if isinstance(value, dict):
            return {key: self._deep(s, own) for key, own in value.items()}
        return value

    def _filled(self, s: Any, text: str) -> str:
        def filling(hole: re.Match[str]) -> str:
            value = _text(self._at(s, hole[1])) if hole[1] else hole[0][0]
            self._spend(len(value))
            return value

        self._spend(len(text))
        return _HOLE.sub(filling, text)

    def _spend(self, size: int) -> None:
        self._said += size
        if self._said > _LONGEST:
            raise BudgetExceeded("characters", _LONGEST, "a program makes and reads no more")

    def _at(self, s: Any, path: str) -> Any:
        """`name.key.0`: within objects and lists, and nowhere else."""
        name, *steps = path.split(".")
        value = self._value(s, name)
        for step in steps:
            if isinstance(value, str):
                self._spend(len(value))
                value = _parsed(value, path)
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise RequestError("name", path, f"has no {step!r}")
        return value


def _gen(step: Gen) -> Any:
    given = {
        "max_tokens": step.max_tokens,
        "temperature": step.temperature,
        "top_p": step.top_p,
        "stop": step.stop,
        "regex": step.regex,
        "dtype": {"int": int, "float": float, "str": str, "bool": bool}[step.dtype] if step.dtype else None,
        "json_schema": json.dumps(step.json_schema) if step.json_schema is not None else None,
    }
    return sgl.gen(step.name, **{name: value for name, value in given.items() if value is not None})


def _size(value: Any) -> int:
    """How much there is to compare, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return _VALUE + (sum(map(_size, value)) if isinstance(value, list) else 0)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parsed(text: str, path: str) -> Any:
    """A variable that was drawn as JSON can be looked into."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("name", path, "is text, not JSON") from None
