"""Requests wait for their slots in the order they came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from support.engine import finish
from weft.backend.room import Room
from weft.runtime.errors import RequestError


class Office:
    """A room of 4, with what it promised and who is in."""

    def __init__(self) -> None:
        self.promised: list[int] = []
        self.room = Room(4, self.promised.append)
        self.inside: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}

    async def visit(self, name: str, slots: int) -> None:
        self.leave[name] = asyncio.Event()
        async with self.room.take(slots, "n", slots) as give_back:
            self.inside.append(name)
            await self.leave[name].wait()
            give_back(1)
            self.inside.remove(name)

    def send(self, name: str, slots: int) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.visit(name, slots))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def check(work: Callable[[Office], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        office = Office()
        await work(office)
        for event in office.leave.values():
            event.set()
        await settle()
        assert office.inside == []
        async with office.room.take(4, "n", 4):  # every slot came back
            pass

    finish(run())


def test_first_come_first_served() -> None:
    async def work(office: Office) -> None:
        for name, slots in (("a", 2), ("b", 2), ("c", 3), ("d", 1)):
            office.send(name, slots)
        await settle()
        assert office.inside == ["a", "b"]
        office.leave["a"].set()
        await settle()
        assert office.inside == ["b"]  # c needs one more, and d does not overtake it
        office.leave["b"].set()
        await settle()
        assert office.inside == ["c", "d"]
        assert office.promised == [2, 4, 3, 4]

    check(work)


def test_what_is_given_back_early_serves_others() -> None:
    async def work(office: Office) -> None:
        async with office.room.take(4, "n", 4) as give_back:
            office.send("b", 3)
            await settle()
            assert office.inside == []
            give_back(3)
            await settle()
            assert office.inside == ["b"]

    check(work)


def test_who_is_cancelled_waits_no_more() -> None:
    async def work(office: Office) -> None:
        office.send("a", 4)
        tasks = [office.send(name, 4) for name in "bcd"]
        await settle()
        for task in tasks[:2]:  # the first in the queue, and one behind it
            task.cancel()
        await settle()
        office.leave["a"].set()
        await settle()
        assert office.inside == ["d"]

    check(work)


def test_errors_give_back_too() -> None:
    async def work(office: Office) -> None:
        with pytest.raises(KeyError):
            async with office.room.take(4, "n", 4):
                raise KeyError

    check(work)


def test_more_than_there_are() -> None:
    async def work(office: Office) -> None:
        with pytest.raises(RequestError, match="n = 9: needs 5 slots, the engine has 4"):
            async with office.room.take(5, "n", 9):
                pass

    check(work)
