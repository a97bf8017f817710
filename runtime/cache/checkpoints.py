"""Raw states saved at cuts, in a pool of their own (`PoolSizes.checkpoints`).

A checkpoint owns a slot for tails, folds and streams, and shares the window pages that its sequence had at the
cut: whoever writes into one of them copies it first. It has no entries: those are a chain's (`cache.base`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState


@dataclass(eq=False)
class Checkpoint:
    """The raw state at `cut`. window: logical number -> page. saves: tokens to compute without it. uses: how often
    it was restored; used: when it was saved or restored last. dropped: it has nothing any more."""

    cut: int
    slot: int
    window: dict[int, int]
    saves: int
    used: int
    uses: int = 0
    dropped: bool = False


class Checkpoints:
    """All checkpoints of the pools. They take the same room each, so what one is worth is what it saves."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._free = list(range(pools.sizes.raw - 1, pools.sizes.slots - 1, -1))
        self._clock = itertools.count(1)
        self.held: list[Checkpoint] = []

    @property
    def free(self) -> int:
        return len(self._free)

    def save(self, state: SequenceState, saves: int) -> Checkpoint:
        """The raw state that `state` has now. Ask `free` first, and drop one if there is none."""
        assert self._free and not state.behind and state.length > 0
        share = self._pools.allocators["window"].share
        window = {number: share(page) for number, page in state.pages["window"].items()}
        checkpoint = Checkpoint(state.length, self._free.pop(), window, saves, next(self._clock))
        self._pools.copy_raw(state.slot, checkpoint.slot)
        self.held.append(checkpoint)
        return checkpoint

    def restore(self, checkpoint: Checkpoint, state: SequenceState) -> None:
        """Give its raw state to an empty one that has adopted a chain at least as long."""
        state.restore(checkpoint.cut, checkpoint.slot, checkpoint.window)
        checkpoint.uses += 1
        checkpoint.used = next(self._clock)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Give back what it owns."""
        self.held.remove(checkpoint)
        for page in checkpoint.window.values():
            self._pools.allocators["window"].release(page)
        checkpoint.window, checkpoint.dropped = {}, True
        self._free.append(checkpoint.slot)

    def least(self) -> Checkpoint:
        """The one worth least: work it saves, times how often it was of use, over how long ago that was."""
        now = next(self._clock)
        return min(self.held, key=lambda c: (c.saves * (1 + c.uses) / (now - c.used), c.used))

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        slots = [checkpoint.slot for checkpoint in self.held] + self._free
        assert sorted(slots) == list(range(self._pools.sizes.slots, self._pools.sizes.raw))
        window = self._pools.config.sliding_window
        for checkpoint in self.held:
            size = self._pools.sizes.page
            needed = range(max(checkpoint.cut - window + 1, 0) // size, (checkpoint.cut - 1) // size + 1)
            assert set(needed) <= set(checkpoint.window)
