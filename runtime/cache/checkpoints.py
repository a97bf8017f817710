"""Raw states saved at cuts, in a pool of their own (`PoolSizes.checkpoints`).

A checkpoint owns a slot for tails, folds and streams, and shares the window pages that its sequence had at the
cut: whoever writes into one of them copies it first. It has no entries: those are a chain's (`cache.base`).

Near ones stand a little before a place where histories are expected to go on, for those that part just before it
(a blank trimmed, another suffix). At most a quarter of the pool is theirs; one that was of use is like any other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState


@dataclass(eq=False)
class Checkpoint:
    """The raw state at `cut`. window: logical number -> page. saves: tokens to compute without it. uses: how often
    it was restored; used: when it was saved or restored last. near: see above. rows_from: the state's.
    dropped: it has nothing any more."""

    cut: int
    slot: int
    window: dict[int, int]
    saves: int
    used: int
    uses: int = 0
    near: bool = False
    rows_from: int = 0
    dropped: bool = False


class Checkpoints:
    """All checkpoints of the pools. They take the same room each, so what one is worth is what it saves."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._free = list(range(pools.sizes.raw - 1, pools.sizes.slots - 1, -1))
        self.most_near = len(self._free) // 4
        self._clock = itertools.count(1)
        self.held: list[Checkpoint] = []

    def save(self, state: SequenceState, saves: int, *, near: bool = False) -> Checkpoint | None:
        """The raw state that `state` has now; the one worth least goes for it. None if there is no place for its
        kind at all."""
        assert not state.behind and state.length > 0
        if not self._make_place(near):
            return None
        share = self._pools.allocators["window"].share
        window = {number: share(page) for number, page in state.pages["window"].items()}
        slot = self._free.pop()
        used = next(self._clock)
        checkpoint = Checkpoint(state.length, slot, window, saves, used, near=near, rows_from=state.rows_from)
        self._pools.copy_raw(state.slot, checkpoint.slot)
        self.held.append(checkpoint)
        return checkpoint

    def restore(self, checkpoint: Checkpoint, state: SequenceState) -> None:
        """Give its raw state to an empty one that has adopted a chain at least as long."""
        state.restore(checkpoint.cut, checkpoint.slot, checkpoint.window, checkpoint.rows_from)
        checkpoint.uses += 1
        checkpoint.near = False
        checkpoint.used = next(self._clock)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Give back what it owns."""
        self.held.remove(checkpoint)
        for page in checkpoint.window.values():
            self._pools.allocators["window"].release(page)
        checkpoint.window, checkpoint.dropped = {}, True
        self._free.append(checkpoint.slot)

    def least(self, near: bool | None = None) -> Checkpoint:
        """The one worth least, of near ones or of others only if so asked: work it saves, times how often it was
        of use, over how long ago that was."""
        now = next(self._clock)
        held = [c for c in self.held if near is None or c.near == near]
        return min(held, key=lambda c: (c.saves * (1 + c.uses) / (now - c.used), c.used))

    def _make_place(self, near: bool) -> bool:
        if near and sum(c.near for c in self.held) >= self.most_near:
            if not self.most_near:
                return False
            self.drop(self.least(near=True))
        elif not self._free:
            if not self.held:
                return False
            self.drop(self.least(near=False))
        return True

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        slots = [checkpoint.slot for checkpoint in self.held] + self._free
        assert sorted(slots) == list(range(self._pools.sizes.slots, self._pools.sizes.raw))
        window = self._pools.config.sliding_window
        for checkpoint in self.held:
            size = self._pools.sizes.page
            needed = range(max(checkpoint.cut - window + 1, 0) // size, (checkpoint.cut - 1) // size + 1)
            assert set(needed) <= set(checkpoint.window)
