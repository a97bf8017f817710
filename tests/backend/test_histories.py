"""The table of texts and their tokens, by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from weft.backend.borders import Border
from weft.backend.histories import Histories
from weft.runtime.errors import EngineDead

OPEN = Border(0, 0)


class Held:
    """Stands for a sequence. Its forks end when `go` is set."""

    def __init__(self) -> None:
        self.closed = 0
        self.go: asyncio.Event | None = None

    def close(self) -> None:
        self.closed += 1

    async def fork(self) -> list[Held]:
        if self.go is not None:
            await self.go.wait()
        if self.closed:
            raise EngineDead("forked after it was closed")
        return [Held()]


def held(count: int) -> list[Any]:
    return [Held() for _ in range(count)]


def found(histories: Histories, text: str) -> tuple[str, list[int]] | None:
    entry = histories.longest_prefix(text)
    return entry and (entry[0], entry[1].tokens)


@pytest.fixture
def histories() -> Histories:
    return Histories(live=3, known=5)


def test_the_longest_beginning_is_found(histories: Histories) -> None:
    assert found(histories, "abc") is None
    for text in ("ab", "abcd", "x"):
        histories.put(text, [len(text)], None, OPEN)
    assert found(histories, "a") is None
    assert found(histories, "ab") == ("ab", [2])
    assert found(histories, "abc") == ("ab", [2])
    assert found(histories, "abcde") == ("abcd", [4])
    assert found(histories, "xyz") == ("x", [1])
    assert found(histories, "bab") is None


def test_a_text_keeps_its_first_tokens(histories: Histories) -> None:
    histories.put("a", [1], None, OPEN)
    (other,) = held(1)
    histories.put("a", [2], other, OPEN)
    assert found(histories, "a") == ("a", [1])
    assert other.closed == 1


def test_kv_is_taken_where_there_is_none(histories: Histories) -> None:
    first, second = held(2)
    histories.put("a", [1], None, OPEN)
    histories.put("a", [1], first, OPEN)
    assert histories.longest_prefix("a")[1].sequence is first
    histories.put("a", [1], second, OPEN)
    histories.put("a", [1], None, OPEN)
    assert histories.longest_prefix("a")[1].sequence is first
    assert (first.closed, second.closed) == (0, 1)


def test_live_bounds_what_is_held(histories: Histories) -> None:
    sequences = held(5)
    for name, sequence in zip("abcde", sequences, strict=True):
        histories.put(name, [1], sequence, OPEN)
    assert [s.closed for s in sequences] == [1, 1, 0, 0, 0]
    assert [histories.longest_prefix(name)[1].sequence for name in "ab"] == [None, None]
    assert found(histories, "a") == ("a", [1])  # the tokens stay


def test_the_least_recently_used_goes_first(histories: Histories) -> None:
    a, b, c, d = held(4)
    for name, sequence in zip("abc", (a, b, c), strict=True):
        histories.put(name, [1], sequence, OPEN)
    histories.longest_prefix("apple")
    histories.put("d", [1], d, OPEN)
    assert [s.closed for s in (a, b, c, d)] == [0, 1, 0, 0]


def test_known_bounds_what_is_remembered(histories: Histories) -> None:
    sequences = held(8)
    for i, sequence in enumerate(sequences):
        histories.put("a" * (i + 1), [i], sequence, OPEN)
    assert [s.closed for s in sequences] == [1] * 5 + [0] * 3
    assert found(histories, "aaa") is None
    assert found(histories, "aaaa") == ("aaaa", [3])
    assert found(histories, "a" * 20) == ("a" * 8, [7])


def test_release(histories: Histories) -> None:
    assert histories.release() is False
    a, b, c = held(3)
    for name, sequence in zip("abc", (a, b, c), strict=True):
        histories.put(name, [1], sequence, OPEN)
    assert histories.release(0.34) is True
    assert [s.closed for s in (a, b, c)] == [1, 0, 0]
    assert histories.release(0.01) is True  # at least one, or asking again would not help
    assert [s.closed for s in (a, b, c)] == [1, 1, 0]
    assert histories.release() is True
    assert histories.release() is False
    assert [s.closed for s in (a, b, c)] == [1, 1, 1]
    assert found(histories, "c") == ("c", [1])


def test_the_longest_held_beginning_of_the_same_tokens(histories: Histories) -> None:
    a, abc = held(2)
    histories.put("a", [1], a, OPEN)
    histories.put("ab", [1, 2], None, OPEN)
    histories.put("abc", [1, 9], abc, OPEN)
    assert histories.longest_held("abcd", [1, 9, 4]) is histories.longest_prefix("abc")[1]
    assert histories.longest_held("abcd", [1, 2, 4]) is histories.longest_prefix("a")[1]
    assert histories.longest_held("abcd", [7]) is None
    assert histories.longest_held("x", [1]) is None


def test_what_is_being_forked_stays(histories: Histories) -> None:
    """Closing it would cancel the fork; the bounds hold again once it has ended."""
    sequences = held(5)

    async def run() -> None:
        histories.put("a", [1], sequences[0], OPEN)
        entry = histories.longest_prefix("a")[1]
        sequences[0].go = asyncio.Event()
        forks = [asyncio.ensure_future(histories.fork(entry)) for _ in range(2)]
        await asyncio.sleep(0)
        for name, sequence in zip("bcde", sequences[1:], strict=True):
            histories.put(name, [1], sequence, OPEN)
        assert [s.closed for s in sequences] == [0, 1, 0, 0, 0]
        assert histories.release() is True
        assert [s.closed for s in sequences] == [0, 1, 1, 1, 1]
        assert histories.release() is False
        forks[1].cancel()
        sequences[0].go.set()
        assert isinstance(await forks[0], Held)
        assert entry.forking == 0
        assert histories.release() is True
        assert sequences[0].closed == 1

    asyncio.run(run())


def test_trim_to_fewer(histories: Histories) -> None:
    a, b, c = held(3)
    for name, sequence in zip("abc", (a, b, c), strict=True):
        histories.put(name, [1], sequence, OPEN)
    histories.trim(live=5)
    assert [s.closed for s in (a, b, c)] == [0, 0, 0]
    histories.trim(live=1)
    assert [s.closed for s in (a, b, c)] == [1, 1, 0]
    histories.trim(live=0, spare=histories.longest_prefix("c")[1])
    assert c.closed == 0
    histories.trim(live=0)
    assert c.closed == 1
