"""Who may run now: a request waits for all the slots it needs before it takes the first of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from weft.runtime.errors import RequestError


class Room:
    """Promises the slots of one engine, first come, first served: whoever was admitted can end without anyone
    else ending first. Used from one event loop only.

    `changed` is told how many slots are promised, each time the number grows.
    """

    def __init__(self, slots: int, changed: Callable[[int], None]) -> None:
        self._slots = slots
        self._changed = changed
        self._promised = 0
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def take(self, slots: int, field: str, value: object) -> AsyncIterator[Callable[[int], None]]:
        """Wait for `slots`; yields a function that gives some of them back early."""
        if slots > self._slots:
            raise RequestError(field, value, f"needs {slots} slots, the engine has {self._slots}")
        async with self._turn:
            while self._promised + slots > self._slots:
                self._given_back.clear()
                await self._given_back.wait()
            self._promised += slots
        self._changed(self._promised)
        mine = slots

        def give_back(count: int) -> None:
            nonlocal mine
            mine -= count
            self._promised -= count
            self._given_back.set()

        try:
            yield give_back
        finally:
            give_back(mine)
