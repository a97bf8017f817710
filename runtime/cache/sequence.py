"""One sequence's KV state: a slot and the pages its history occupies."""

from __future__ import annotations

from collections.abc import Mapping

from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import KINDS, TOKENS_PER_ROW, PageKind
from weft.runtime.cache.pools import Pools


class SequenceState:
    """KV of `length` tokens. Owns its slot and one reference to each of its pages.

    Pages may be shared with forks: a page is copied before this sequence writes into it (only the partly filled
    last page can be both shared and written). Every method leaves `pools.tables` in step with `pages`.
    """

    def __init__(self, pools: Pools) -> None:
        """Takes a slot: ask `pools.free_slots` first."""
        self.pools = pools
        self.slot = pools.take_slot()
        self.length = 0
        # Entries of groups below `chain` are there; a replay, if one is on, has begun at `floor`, else 0.
        self.chain = self.floor = 0
        # The MTP block's rows are there from this position on, up to length-2.
        self.rows_from = 0
        # Logical page number -> page; window pages that the window has left are gone.
        self.pages: dict[PageKind, dict[int, int]] = {kind: {} for kind in KINDS}

    # -- beginning behind a chain -----------------------------------------------------------------------

    def adopt(self, pages: Mapping[PageKind, Mapping[int, int]], chain: int) -> None:
        """Share the entry pages of the first `chain` tokens; the state must be empty. It then has to be given raw
        state (`cache.base`), by `restore` or `begin_replay`."""
        assert self.length == 0 and not any(self.pages.values())
        self.chain = chain
        for kind, own in pages.items():
            for number, page in own.items():
                self._hold(kind, number, self.pools.allocators[kind].share(page))

    def restore(self, cut: int, slot: int, window: Mapping[int, int], rows_from: int = 0) -> None:
        """Take the raw state at `cut`, at most the chain's end: the fixed part from a slot, and window pages to
        share. Tokens between the cut and the chain's end are computed next."""
        assert self.length == 0 and cut <= self.chain and not self.pages["window"]
        self.length, self.rows_from = cut, rows_from
        self.pools.copy_raw(slot, self.slot)
        for number, page in window.items():
            self._hold("window", number, self.pools.allocators["window"].share(page))

    def begin_replay(self, start: int) -> None:
        """Tokens from `start` on are computed next; see `cache.base.replay_start`."""
        assert 0 <= start <= self.chain
        self.length = self.floor = start
        if start:
            self.rows_from = max(self.chain - self.pools.config.sliding_window, 0)

    @property
    def behind(self) -> int:
        """Tokens to compute until the raw state is that of the chain's end."""
        return max(self.chain - self.length, 0)

    def span(self, count: int) -> Span:
        """The next `count` tokens. A replay ends where the chain does."""
        assert not self.behind or count <= self.behind
        return Span(self.slot, self.length, count, self.chain, self.floor)

    # -- growth: can_reserve / reserve, then the model writes, then commit ------------------------------

    def needs(self, kind: PageKind, count: int) -> int:
        """Pages that `count` more tokens take."""
        return len(self._new_pages(kind, count))

    def can_reserve(self, count: int) -> bool:
        """Whether `count` more tokens fit now."""
        return all(self.pools.allocators[kind].can_alloc(self.needs(kind, count)) for kind in KINDS)

    def reserve(self, count: int) -> None:
        """Make the rows of the next `count` tokens writable by this sequence alone."""
        assert self.can_reserve(count), "reserve without can_reserve"
        for kind in KINDS:
            allocator, held = self.pools.allocators[kind], self.pages[kind]
            shared: dict[int, int] = {}  # page -> the copy of it that is this sequence's own
            for number in self._new_pages(kind, count):
                page = allocator.alloc()
                if number in held:
                    shared[held[number]] = page
                self._hold(kind, number, page)
            self.pools.copy_pages(kind, [*shared], [*shared.values()])
            for page in shared:
                allocator.release(page)

    def _new_pages(self, kind: PageKind, count: int) -> list[int]:
        """Logical pages to allocate before `count` tokens: the missing ones and a shared one to be written."""
        ratio, size = TOKENS_PER_ROW[kind], self.pools.sizes.page
        start = self.length if kind == "window" else max(self.length, self.chain)
        first, end = start // ratio, (self.length + count) // ratio
        if first >= end:
            return []
        if kind == "window" and self.pools.config.has_mtp:
            first = max(0, first - 1)  # the MTP row of the last token is written with the next one
        held, allocator = self.pages[kind], self.pools.allocators[kind]
        numbers = range(first // size, (end - 1) // size + 1)
        return [n for n in numbers if n not in held or allocator.is_shared(held[n])]

    def _hold(self, kind: PageKind, number: int, page: int) -> None:
        self.pages[kind][number] = page
        self.pools.tables[kind][self.slot, number] = page * self.pools.sizes.page

    @property
    def can_draft(self) -> bool:
        """Whether all rows are there that the MTP block reads behind the last token."""
        return not self.behind and self.rows_from <= max(self.length - self.pools.config.sliding_window, 0)

    def commit(self, count: int, *, rows: bool = True) -> None:
        """The model has written `count` tokens: advance, and drop window pages no later token reads.
        rows: those of the MTP block too, but that of the last token."""
        self.length += count
        if not rows:
            self.rows_from = self.length - 1
        if not self.behind:
            self.floor = 0
        # A continuation reads W-1 rows back; its MTP row, at length-1, one more.
        oldest = max(0, self.length - self.pools.config.sliding_window)
        held = self.pages["window"]
        for number in [n for n in held if (n + 1) * self.pools.sizes.page <= oldest]:
            self.pools.allocators["window"].release(held.pop(number))
            self.pools.tables["window"][self.slot, number] = 0

    # -- lifetime ---------------------------------------------------------------------------------------

    def fork(self) -> SequenceState:
        """A sequence with the same history, sharing every page. Ask `pools.free_slots` first."""
        child = SequenceState(self.pools)
        child.length, child.chain, child.floor = self.length, self.chain, self.floor
        child.rows_from = self.rows_from
        for kind in KINDS:
            allocator = self.pools.allocators[kind]
            child.pages[kind] = {n: allocator.share(page) for n, page in self.pages[kind].items()}
        self.pools.copy_slot(self.slot, child.slot)
        return child

    def close(self) -> None:
        """Give everything back. The state must not be used afterwards."""
        for kind in KINDS:
            for page in self.pages[kind].values():
                self.pools.allocators[kind].release(page)
            self.pages[kind] = {}
        self.pools.return_slot(self.slot)
        self.slot = -1
