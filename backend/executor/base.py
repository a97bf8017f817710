"""What the parts of the executor share: limits and scopes, what a run emits, costs, and how it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import BudgetExceeded, Cancelled, ConfigError, DeadlineExceeded, WeftError

if TYPE_CHECKING:
    from weft.backend.executor.lane import Lane
    from weft.backend.executor.outside import Outside
    from weft.backend.executor.stalls import Watch
    from weft.backend.executor.transcript import Gates


_LEAST = 1e-9  # of a cost
TookKind = Literal["gen", "select", "fork", "compute", "tool"]


class ProgramError(WeftError):
    """A run failed. program: its name. path: of the state ("" the program's own, "/0/1" a fork of a fork).
    variable: what was being made, if it has a name. `__cause__` is what happened.
    partial: where states were joined, what each of them has: its variables, or its `Branch`."""

    def __init__(self, program: str, path: str, variable: str | None, cause: BaseException) -> None:
        what = f", variable {variable!r}" if variable else ""
        super().__init__(f"{program}{path and ', state ' + path}{what}: {type(cause).__name__}: {cause}")
        self.program, self.path, self.variable = program, path, variable
        self.partial: list[Any] = []
        self.__cause__ = cause


def joined(error: ProgramError, partial: list[Any]) -> ProgramError:
    """The error as it is raised where states are joined."""
    if error.partial:  # of a join further down
        assert error.__cause__ is not None
        error = ProgramError(error.program, error.path, error.variable, error.__cause__)
    error.partial = partial
    return error


@dataclass(frozen=True)
class Piece:
    """Text of a variable as it is made. meta: sglang's meta information so far; complete with the last piece.
    index: which of n."""

    path: str
    variable: str | None
    text: str
    meta: dict[str, Any] | None
    index: int = 0


@dataclass(frozen=True)
class Took:
    """What one primitive took: gen, select, fork, compute or tool, by the state's path and its variable or tool.
    Of a tool only the time is known."""

    kind: TookKind
    path: str
    name: str | None
    usage: m.Usage


@dataclass(frozen=True)
class Price:
    """Of a token, in any unit: computed of a prompt, taken from the cache, generated."""

    computed: float = 0.0
    cached: float = 0.0
    generated: float = 1.0


@dataclass(frozen=True)
class Limits:
    """What a run, or a part of it, may take: time from its beginning, generated tokens over all its states, and
    cost by `price`. Parts are held to those of the whole as well. When one is passed, what is under way ends:
    tokens within the step in which they were drawn."""

    seconds: float | None = None
    tokens: int | None = None
    cost: float | None = None
    price: Price = Price()

    def __post_init__(self) -> None:
        for name in ("seconds", "tokens", "cost"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and value > 0):
                raise ConfigError(name, value, "must be a positive number")


UNLIMITED = Limits()


@dataclass
class Cost:
    """What a run took over all its states, in tokens. prompt, cached: of its generations. computed: all that
    were run, for forks and choices too. seconds: of generations, two at a time counted twice. states: so many."""

    generations: int = 0
    prompt: int = 0
    cached: int = 0
    computed: int = 0
    generated: int = 0
    seconds: float = 0.0
    states: int = 0

    def add(self, usage: m.Usage) -> None:
        """A generation has ended; its tokens were counted as they came."""
        self.generations += 1
        self.prompt += usage.history
        self.cached += usage.cached
        self.computed += usage.computed
        self.seconds += usage.total

    def at(self, price: Price) -> float:
        """In money. What is computed of outputs is in the price of generated tokens."""
        prompt = max(0, self.computed - self.generated)
        return prompt * price.computed + self.cached * price.cached + self.generated * price.generated


@dataclass
class Tally:
    """What a run holds, and the most it held at one time. tokens: of its states' histories, what a fork shares
    counted once."""

    states: int = 0
    tokens: int = 0
    most_states: int = 0
    most_tokens: int = 0

    def grow(self, states: int, tokens: int) -> None:
        self.states += states
        self.tokens += tokens
        self.most_states = max(self.most_states, self.states)
        self.most_tokens = max(self.most_tokens, self.tokens)


@dataclass(frozen=True)
class Ground:
    """What all scopes of a run share. loop: the one that its states belong to, in thread `thread`."""

    program: str
    engine: Engine
    template: DeepSeekV4Template
    defaults: Any  # sglang's SglSamplingParams
    loop: asyncio.AbstractEventLoop
    thread: int
    watch: Watch
    outside: Outside
    gates: Gates
    tally: Tally
    emit: Callable[[Piece], None] | None  # if somebody listens
    told: Callable[[Took], None] | None = None
    namespace: str = ""


@dataclass(eq=False)
class Scope:
    """A run, or a part of it that ends by itself: its states, its limits, what it took. Owned by whoever made it,
    who closes it."""

    ground: Ground
    limits: Limits = UNLIMITED
    parent: Scope | None = None
    lanes: dict[Lane, None] = field(default_factory=dict)  # those that live, in order
    cost: Cost = field(default_factory=Cost)
    closed: bool = False
    ends: float | None = None  # by the monotonic clock
    _parts: set[Scope] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.limits.seconds is not None:
            self.ends = time.monotonic() + self.limits.seconds
        if self.parent is not None:
            self.parent._parts.add(self)
            if self.parent.ends is not None:
                self.ends = min(self.parent.ends, self.ends or self.parent.ends)

    def adopt(self, lane: Lane) -> None:
        self.lanes[lane] = None
        self.ground.tally.grow(1, 0)
        scope: Scope | None = self
        while scope is not None:
            scope.cost.states += 1
            scope = scope.parent

    def gave_up(self, lane: Lane) -> None:
        """The lane has ended."""
        self.lanes.pop(lane, None)
        self.ground.tally.grow(-1, -lane.tokens)

    def check(self) -> None:
        """That more may be begun."""
        if self.closed:
            raise Cancelled("the run has ended")

    def left(self) -> float | None:
        """Seconds until its deadline."""
        if self.ends is None:
            return None
        left = self.ends - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline has passed")
        return left

    def ends_on_loop(self) -> float | None:
        """Its deadline by the loop's clock."""
        return None if self.ends is None else self.ground.loop.time() + self.ends - time.monotonic()

    def spend(self, tokens: int) -> None:
        """So many tokens were drawn."""
        scope: Scope | None = self
        while scope is not None:
            scope.cost.generated += tokens
            scope = scope.parent
        self._check_spent(0)

    def worked(self, tokens: int) -> None:
        """So many tokens were run by forks, choices and the like."""
        scope: Scope | None = self
        while scope is not None:
            scope.cost.computed += tokens
            scope = scope.parent

    def add(self, usage: m.Usage) -> None:
        """A generation has ended."""
        scope: Scope | None = self
        while scope is not None:
            scope.cost.add(usage)
            scope = scope.parent

    def tell(self, kind: TookKind, path: str, name: str | None, usage: m.Usage) -> None:
        """A primitive has ended."""
        if self.ground.told is not None:
            self.ground.told(Took(kind, path, name, usage))

    def check_spent(self) -> None:
        """That something is left to spend."""
        self._check_spent(1)

    def _check_spent(self, more: int) -> None:
        scope: Scope | None = self
        while scope is not None:
            limits, cost = scope.limits, scope.cost
            if limits.tokens is not None and cost.generated + more > limits.tokens:
                raise BudgetExceeded("tokens", limits.tokens, f"{cost.generated} were generated")
            if limits.cost is not None and cost.at(limits.price) + more * _LEAST > limits.cost:
                raise BudgetExceeded("cost", limits.cost, f"{cost.at(limits.price):g} was spent")
            scope = scope.parent

    def close(self) -> None:
        """End every state, those of parts too; safe to call twice."""
        self.closed = True
        for part in list(self._parts):
            part.close()
        for lane in list(self.lanes):
            lane.close()
        if self.parent is not None:
            self.parent._parts.discard(self)
