"""The table of texts and their tokens, by itself."""

from __future__ import annotations

from typing import Any

import pytest

from weft.backend.histories import Histories


class Held:
    """Stands for a sequence."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


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
        histories.put(text, [len(text)], None)
    assert found(histories, "a") is None
    assert found(histories, "ab") == ("ab", [2])
    assert found(histories, "abc") == ("ab", [2])
    assert found(histories, "abcde") == ("abcd", [4])
    assert found(histories, "xyz") == ("x", [1])
    assert found(histories, "bab") is None


def test_a_text_keeps_its_first_tokens(histories: Histories) -> None:
    histories.put("a", [1], None)
    (other,) = held(1)
    histories.put("a", [2], other)
    assert found(histories, "a") == ("a", [1])
    assert other.closed == 1


def test_kv_is_taken_where_there_is_none(histories: Histories) -> None:
    first, second = held(2)
    histories.put("a", [1], None)
    histories.put("a", [1], first)
    assert histories.longest_prefix("a")[1].sequence is first
    histories.put("a", [1], second)
    histories.put("a", [1], None)
    assert histories.longest_prefix("a")[1].sequence is first
    assert (first.closed, second.closed) == (0, 1)


def test_live_bounds_what_is_held(histories: Histories) -> None:
    sequences = held(5)
    for name, sequence in zip("abcde", sequences, strict=True):
        histories.put(name, [1], sequence)
    assert [s.closed for s in sequences] == [1, 1, 0, 0, 0]
    assert [histories.longest_prefix(name)[1].sequence for name in "ab"] == [None, None]
    assert found(histories, "a") == ("a", [1])  # the tokens stay


def test_the_least_recently_used_goes_first(histories: Histories) -> None:
    a, b, c, d = held(4)
    for name, sequence in zip("abc", (a, b, c), strict=True):
        histories.put(name, [1], sequence)
    histories.longest_prefix("apple")
    histories.put("d", [1], d)
    assert [s.closed for s in (a, b, c, d)] == [0, 1, 0, 0]


def test_known_bounds_what_is_remembered(histories: Histories) -> None:
    sequences = held(8)
    for i, sequence in enumerate(sequences):
        histories.put("a" * (i + 1), [i], sequence)
    assert [s.closed for s in sequences] == [1] * 5 + [0] * 3
    assert found(histories, "aaa") is None
    assert found(histories, "aaaa") == ("aaaa", [3])
    assert found(histories, "a" * 20) == ("a" * 8, [7])


def test_release(histories: Histories) -> None:
    assert histories.release() is False
    a, b, c = held(3)
    for name, sequence in zip("abc", (a, b, c), strict=True):
        histories.put(name, [1], sequence)
    assert histories.release(0.34) is True
    assert [s.closed for s in (a, b, c)] == [1, 0, 0]
    assert histories.release(0.01) is True  # at least one, or asking again would not help
    assert [s.closed for s in (a, b, c)] == [1, 1, 0]
    assert histories.release() is True
    assert histories.release() is False
    assert [s.closed for s in (a, b, c)] == [1, 1, 1]
    assert found(histories, "c") == ("c", [1])
