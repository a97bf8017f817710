"""Whether one more call fits beside those under way, by the entries that they will really hold.

Only entries are counted: every slot has its window rows. What several calls share is counted once, what only the
prefix cache or idle sequences hold counts as free, and an output is expected to be about as long as others lately,
not as long as it may be. Where that falls short, a call gives way (`Scheduler.take_memory`).
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.runtime.cache.capacity import TOKENS_PER_ROW
from weft.runtime.cache.radix import CHAIN_KINDS, ChainKind, as_tokens
from weft.runtime.engine.calls import Call
from weft.runtime.engine.sequences import Memory

_FIRST_GUESS = 64


class Usual:
    """How long outputs are lately."""

    def __init__(self) -> None:
        self._mean = float(_FIRST_GUESS)

    def add(self, tokens: int) -> None:
        self._mean += (tokens - self._mean) / 8

    @property
    def tokens(self) -> int:
        return round(self._mean)


class Admission:
    """For one moment: ask it for each waiting call in turn."""

    def __init__(self, memory: Memory, running: Iterable[Call], usual: Usual) -> None:
        self._memory = memory
        self._usual = usual.tokens
        states = [(call, call.sequence.held) for call in running]
        self._none_runs = not states
        self._held = {kind: {p for _, state in states for p in state.pages[kind].values()} for kind in CHAIN_KINDS}
        self._wanted = {
            kind: len(self._held[kind])
            + sum(max(self._pages(kind, call) - len(state.pages[kind]), 0) for call, state in states)
            for kind in CHAIN_KINDS
        }

    def admits(self, call: Call) -> bool:
        """Whether it fits, and if so it is one of those under way; the first one always does."""
        sequence, tree = call.sequence, self._memory.prefix.tree
        shared = tree.pages(tree.look(as_tokens(sequence.tokens[: call.known_limit()]), sequence.namespace))
        wanted = {
            kind: self._wanted[kind] + self._pages(kind, call) - len(self._held[kind] & {*shared[kind].values()})
            for kind in CHAIN_KINDS
        }
        allocators = self._memory.pools.allocators
        if not self._none_runs and any(wanted[kind] > allocators[kind].total for kind in CHAIN_KINDS):
            return False
        self._none_runs, self._wanted = False, wanted
        return True

    def _pages(self, kind: ChainKind, call: Call) -> int:
        entries = call.expected_length(self._usual) // TOKENS_PER_ROW[kind]
        return -(-entries // self._memory.pools.sizes.page)
