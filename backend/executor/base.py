"""What the parts of the executor share: a run's scope, what it emits, and how it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Cancelled, DeadlineExceeded, WeftError

if TYPE_CHECKING:
    from weft.backend.executor.lane import Lane


class ProgramError(WeftError):
    """A run failed. program: its name. path: of the state ("" the program's own, "/0/1" a fork of a fork).
    variable: what was being made, if it has a name. `__cause__` is what happened."""

    def __init__(self, program: str, path: str, variable: str | None, cause: BaseException) -> None:
        what = f", variable {variable!r}" if variable else ""
        super().__init__(f"{program}{path and ', state ' + path}{what}: {type(cause).__name__}: {cause}")
        self.program, self.path, self.variable = program, path, variable


@dataclass(frozen=True)
class Piece:
    """Text of a variable as it is made. meta: sglang's meta information so far; complete with the last piece."""

    path: str
    variable: str | None
    text: str
    meta: dict[str, Any] | None


@dataclass
class Cost:
    """What a run took over all its states, in tokens."""

    generations: int = 0
    prompt: int = 0
    cached: int = 0
    computed: int = 0
    generated: int = 0

    def add(self, usage: m.Usage) -> None:
        self.generations += 1
        self.prompt += usage.history
        self.cached += usage.cached
        self.computed += usage.computed + usage.replayed
        self.generated += usage.generated


@dataclass
class Scope:
    """One run. lanes: all its states, which end with it. ends: point of the monotonic clock."""

    program: str
    engine: Engine
    template: DeepSeekV4Template
    defaults: Any  # sglang's SglSamplingParams
    loop: asyncio.AbstractEventLoop
    emit: Callable[[Piece], None]
    namespace: str = ""
    ends: float | None = None
    lanes: list[Lane] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    closed: bool = False

    def check(self) -> None:
        if self.closed:
            raise Cancelled("the run has ended")

    def left(self) -> float | None:
        """Seconds until its deadline."""
        if self.ends is None:
            return None
        left = self.ends - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the run's deadline has passed")
        return left

    def close(self) -> None:
        """End every state; safe to call twice."""
        self.closed = True
        for lane in self.lanes:
            lane.close()
