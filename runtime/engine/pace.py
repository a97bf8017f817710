"""How far calls draft: as far as it pays, by what drafts cost here and how often they are right."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence

_GUESS = 0.4  # of a draft's cost, until it was measured
_HOPE = 0.95  # of a draft's chance behind right ones, before any was drawn
_LAST = 15
_FADES = 256  # after so many steps half of what was measured is forgotten: it may have been a bad moment
_EXPLORE = 32  # of so many steps one does not draft, to know what that takes
# Of so many calls some begin with hope, whatever became of others: together, for few drafts in a step do not pay.
_TRIES, _TRY = 128, 16


class Pace:
    """Of one call. shares: by depth, of its drafts behind right ones that were right themselves, of late."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = list(shares)

    def drafts(self, most: int, cost: float) -> int:
        """How many tokens to draft, if each makes the step longer by `cost` of what it would take."""
        count, chance = 0, 1.0
        for share in self.shares[:most]:
            chance *= share
            if chance <= cost:
                break
            count += 1
        return count

    def gain(self, count: int) -> float:
        """How many of so many drafts are likely to be right."""
        return sum(math.prod(self.shares[: i + 1]) for i in range(count))

    def learn(self, drafted: int, right: int) -> None:
        """The first `right` of so many were drawn; what was drafted behind the next one says nothing."""
        for i in range(min(right + 1, drafted)):
            self.shares[i] += ((i < right) - self.shares[i]) / 8


class Drafting:
    """What is known of drafting in this engine. Steps are told apart by how many calls decode in them."""

    def __init__(self, most: int) -> None:
        """most: tokens that a call may draft per step."""
        self.most = most
        self._shares = [_HOPE] * most
        self._calls = 0
        self._steps: Counter[int] = Counter()
        self._since: Counter[int] = Counter()  # steps without drafts, since the last one with
        # Medians of the last ones: a machine that was busy for a moment says nothing of drafts.
        self._plain: dict[int, deque[float]] = {}
        self._cost: dict[int, deque[float]] = {}

    def pace(self) -> Pace:
        """Of a call that begins. Now and then one that tries: what was found out long ago may no longer be so."""
        turn, self._calls = self._calls % _TRIES, self._calls + 1
        if turn >= _TRY:
            return Pace(self._shares)
        if not turn:
            self._cost.clear()
        return Pace([_HOPE] * self.most)

    def ended(self, pace: Pace) -> None:
        self._shares = [_blend(old, new, 4) for old, new in zip(self._shares, pace.shares, strict=True)]

    def cost(self, calls: int) -> float:
        """Of one draft for every call, as a share of a step without."""
        size = calls.bit_length()
        known = statistics.median(self._cost.get(size, [_GUESS]))
        return _GUESS + (known - _GUESS) * math.pow(0.5, self._since[size] / _FADES)

    def explores(self, calls: int) -> bool:
        """Whether the step that comes is to be one without drafts."""
        size = calls.bit_length()
        self._steps[size] += 1
        few = len(self._plain.get(size, ())) < _LAST // 2
        return self._steps[size] % (_EXPLORE // 8 if few else _EXPLORE) == 1

    def took(self, calls: int, drafts: int, seconds: float) -> None:
        """A step in which each of `calls` computed one token, and some of them guessed ones, `drafts` in all."""
        size = calls.bit_length()
        self._since[size] = 0 if drafts else self._since[size] + 1
        if not drafts:
            self._plain.setdefault(size, deque(maxlen=_LAST)).append(seconds)
        elif size in self._plain and 2 * drafts >= calls:  # of fewer, the block's passes would be all the cost
            cost = (seconds / statistics.median(self._plain[size]) - 1) * calls / drafts
            self._cost.setdefault(size, deque([_GUESS] * 3, maxlen=_LAST)).append(cost)


def _blend(old: float, new: float, weight: int) -> float:
    return old + (new - old) / weight
