"""Who may begin: a program that said what it needs at most has it until it ends, or is told so before its first
token."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from weft.backend.executor.base import Tally
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Overloaded, RequestError

P = TypeVar("P")
_DECLARED = "weft_declared"


@dataclass(frozen=True)
class Need:
    """Of one run, at most at one time. tokens: of its states' histories, what a fork shares counted once."""

    states: int = 1
    tokens: int = 0


@dataclass(frozen=True)
class Declared:
    need: Need | None = None
    thread: bool = False


def declare(*, states: int | None = None, tokens: int | None = None, thread: bool = False) -> Callable[[P], P]:
    """What the executor should know of a program; stands above `@sgl.function`.

    states, tokens: what a run needs at most at one time (`Need`), reserved before it begins. thread: its body
    computes a lot, or blocks, and gets a thread of its own."""

    def mark(program: P) -> P:
        need = None if states is None and tokens is None else Need(states or 1, tokens or 0)
        setattr(program.func, _DECLARED, Declared(need, thread))  # type: ignore[attr-defined]
        return program

    return mark


def declared(program: Any) -> Declared:
    found: Declared = getattr(program.func, _DECLARED, Declared())
    return found


class Admission:
    """The slots and the KV of one engine, promised first come, first served. Used from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.states, self.tokens = engine.slots, engine.config.pools.tokens
        self._promised = Need(0, 0)
        self._waiting: deque[tuple[Need, asyncio.Future[None]]] = deque()
        self._seconds = 1.0  # that a run takes, of late
        self._running = 0
        self._seen: dict[Any, Need] = {}

    def traced(self, program: Any) -> Need | None:
        """The most that one of its runs held so far."""
        return self._seen.get(program.func)

    def saw(self, program: Any, tally: Tally) -> None:
        known = self._seen.get(program.func, Need(0, 0))
        self._seen[program.func] = Need(max(known.states, tally.most_states), max(known.tokens, tally.most_tokens))

    @asynccontextmanager
    async def enter(self, need: Need, patience: float | None) -> AsyncIterator[None]:
        """patience: seconds to wait for room, None for as long as it takes.

        Raises `Overloaded` if there is none by then, with a guess at when there will be; `RequestError` if there
        never will be."""
        for name, most in (("states", self.states), ("tokens", self.tokens)):
            if getattr(need, name) > most:
                raise RequestError(name, getattr(need, name), f"the engine has {most}")
        await self._admit(need, patience)
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += (time.monotonic() - began - self._seconds) / 8
            self._running -= 1
            self._promise(need, -1)
            self._let_in()

    async def _admit(self, need: Need, patience: float | None) -> None:
        if not self._waiting and self._fits(need):
            self._running += 1
            self._promise(need, 1)
            return
        entry = need, asyncio.get_running_loop().create_future()
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(patience):
                await entry[1]
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
            if not entry[1].cancelled() and entry[1].done():  # it was let in, but is not there any more
                self._running -= 1
                self._promise(need, -1)
            self._let_in()
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"{self._promised.states} of {self.states} states and {self._promised.tokens} of "
                    f"{self.tokens} tokens are promised to {self._running} runs; "
                    f"{need.states} and {need.tokens} are needed",
                    self._seconds * (len(self._waiting) + 1) / max(self._running, 1),
                ) from None
            raise

    def _fits(self, need: Need) -> bool:
        return (
            self._promised.states + need.states <= self.states
            and self._promised.tokens + need.tokens <= self.tokens
        )

    def _promise(self, need: Need, sign: int) -> None:
        self._promised = Need(
            self._promised.states + sign * need.states, self._promised.tokens + sign * need.tokens
        )

    def _let_in(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            need, future = self._waiting.popleft()
            if not future.done():
                self._running += 1
                self._promise(need, 1)
                future.set_result(None)
