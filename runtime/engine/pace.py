"""How far calls draft: as far as it pays, by what drafts cost here and how often they are right."""

from __future__ import annotations

from collections import Counter

_GUESS = 0.4  # of a draft's cost, until it was measured
_HOPE = 0.7  # of a draft's chance, before a call has drafted
_EXPLORE = 32  # of so many steps one does not draft, to know what that takes
_TRY = 8  # of so many calls one begins with hope, whatever became of others


class Pace:
    """Of one call. share: of its drafts that were right, of late."""

    def __init__(self, share: float) -> None:
        self.share = share

    def drafts(self, most: int, cost: float) -> int:
        """How many tokens to draft, if each makes the step longer by `cost` of what it would take."""
        count, chance = 0, self.share
        while count < most and chance > cost:
            count, chance = count + 1, chance * self.share
        return count

    def learn(self, drafted: int, right: int) -> None:
        """The first `right` of so many were drawn; what was drafted behind the next one says nothing."""
        for i in range(min(right + 1, drafted)):
            self.share += ((i < right) - self.share) / 8


class Drafting:
    """What is known of drafting in this engine. Steps are told apart by how many calls decode in them."""

    def __init__(self, most: int) -> None:
        """most: tokens that a call may draft per step."""
        self.most = most
        self._share = _HOPE
        self._calls = 0
        self._steps: Counter[int] = Counter()
        self._plain: dict[int, float] = {}
        self._cost: dict[int, float] = {}

    def pace(self) -> Pace:
        """Of a call that begins."""
        self._calls += 1
        return Pace(_HOPE if self._calls % _TRY == 0 else self._share)

    def ended(self, pace: Pace) -> None:
        self._share += (pace.share - self._share) / 4

    def cost(self, calls: int) -> float:
        """Of one draft for every call, as a share of a step without."""
        return self._cost.get(calls.bit_length(), _GUESS)

    def explores(self, calls: int) -> bool:
        """Whether the step that comes is to be one without drafts."""
        self._steps[calls.bit_length()] += 1
        return self._steps[calls.bit_length()] % _EXPLORE == 1

    def took(self, calls: int, drafts: int, seconds: float) -> None:
        """A step in which each of `calls` computed one token, and `drafts` guessed ones."""
        size = calls.bit_length()
        if not drafts:
            self._plain[size] = _blend(self._plain.get(size), seconds)
        elif size in self._plain:
            cost = (seconds / self._plain[size] - 1) / drafts
            self._cost[size] = _blend(self._cost.get(size), cost)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + (new - old) / 8
