"""Generations, one or several at a time, that outlive a core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.handle import Sequence as Held
from weft.runtime.errors import EngineDead

_ATTEMPTS = 3  # at a generation on cores that die
T = TypeVar("T")


class Keeper(Protocol):
    """Leases KV behind a generation (`http.sessions`)."""

    def keep(self, namespace: str, session: str, sequence: Held, seconds: float | None = None) -> None: ...


@dataclass(frozen=True)
class Lease:
    """Of a generation's KV, for the session it belongs to. seconds: None for the server's time."""

    keeper: Keeper
    namespace: str
    session: str
    seconds: float | None = None

    def take(self, sequence: Held) -> None:
        self.keeper.keep(self.namespace, self.session, sequence, self.seconds)


@dataclass(frozen=True)
class Drawn:
    """The end of a generation. before: what the fork took that its sequence began with, if it did."""

    done: m.Done
    before: m.Usage | None


async def draw(
    opened: Callable[[], Held], params: SamplingParams, lease: Lease | None = None, forked: Held | None = None
) -> AsyncGenerator[m.Delta | Drawn]:
    """Deltas, then the end. opened: makes a sequence of the prompt; forked: one to begin with, taken over.

    params.seed is set: if a core dies, the next one draws the same, and what was yielded is not yielded again."""
    assert params.seed is not None
    seen = 0
    for attempt in range(_ATTEMPTS):
        own, before = (forked, forked.origin) if forked is not None else (opened(), None)
        forked, known, kept = None, seen, False
        try:
            async with aclosing(own.generate(params)) as events:
                async for event in events:
                    if isinstance(event, m.Done):
                        if lease is not None:
                            kept = True
                            lease.take(own)
                        yield Drawn(event, before)
                        return
                    if known:
                        known -= 1
                        continue
                    seen += 1
                    yield event
        except EngineDead:
            if attempt == _ATTEMPTS - 1:
                raise
        finally:
            if not kept:
                own.close()


def merged(parts: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """What all of them yield, as it comes. The first failure ends all."""
    return parts[0] if len(parts) == 1 else _merged(parts)


async def _merged(parts: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    events: asyncio.Queue[T | _End] = asyncio.Queue()

    async def pump(part: AsyncGenerator[T]) -> None:
        async with aclosing(part) as own:
            async for event in own:
                events.put_nowait(event)

    tasks = [asyncio.ensure_future(pump(part)) for part in parts]
    for task in tasks:
        task.add_done_callback(lambda ended: events.put_nowait(_End(ended)))
    left = len(tasks)
    try:
        while left:
            came = await events.get()
            if isinstance(came, _End):
                came.task.result()
                left -= 1
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class _End:
    task: asyncio.Task[None]
