"""Page ownership: which pages are free and how many holders each used one has."""

from __future__ import annotations


class PageAllocator:
    """Reference counts over pages 1..n-1; page 0 is the null page, never handed out.

    Owns no memory. Allocation is a can_alloc / alloc pair: alloc asserts that the caller asked first.
    """

    def __init__(self, pages: int) -> None:
        assert pages >= 2, "a pool needs the null page and at least one more"
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        return len(self._free)

    def can_alloc(self, count: int) -> bool:
        return count <= len(self._free)

    def alloc(self) -> int:
        """A page held once, by the caller."""
        assert self._free, "alloc without can_alloc"
        page = self._free.pop()
        assert self._holders[page] == 0
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a holder; returns the page for convenience."""
        assert self._holders[page] > 0
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        """Drop a holder; the last one frees the page."""
        assert self._holders[page] > 0
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def holders(self, page: int) -> int:
        return self._holders[page]

    def check(self) -> None:
        """Every page is either free or held."""
        held = sum(count > 0 for count in self._holders)
        assert held + len(self._free) == self.total
        assert len(set(self._free)) == len(self._free) and 0 not in self._free
        assert all(self._holders[page] == 0 for page in self._free)
