"""Page numbers are handed out once, counted right and come back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.runtime.cache.pages import PageAllocator

OPERATIONS = st.lists(st.tuples(st.sampled_from(("alloc", "share", "release")), st.integers(0, 1 << 16)))


@given(pages=st.integers(2, 12), operations=OPERATIONS)
def test_counts_follow_a_plain_counter(pages: int, operations: list[tuple[str, int]]) -> None:
    allocator, holders = PageAllocator(pages), Counter[int]()
    for name, number in operations:
        held = sorted(holders)
        if name == "alloc" and allocator.can_alloc(1):
            page = allocator.alloc()
            assert page not in holders
            assert 1 <= page < pages
            holders[page] = 1
        elif name == "share" and held:
            page = held[number % len(held)]
            assert allocator.share(page) == page
            holders[page] += 1
        elif name == "release" and held:
            page = held[number % len(held)]
            allocator.release(page)
            holders = Counter({p: n for p, n in (holders - Counter([page])).items() if n})
        allocator.check()
        assert allocator.free == pages - 1 - len(holders)
        assert [allocator.can_alloc(n) for n in range(pages)] == [n <= allocator.free for n in range(pages)]
        assert all(allocator.is_shared(p) == (n > 1) for p, n in holders.items())


def test_the_null_page_is_never_handed_out() -> None:
    allocator = PageAllocator(4)
    assert {allocator.alloc() for _ in range(allocator.total)} == {1, 2, 3}
    assert not allocator.can_alloc(1)


def test_a_page_stays_until_its_last_holder_leaves() -> None:
    allocator = PageAllocator(2)
    page = allocator.share(allocator.alloc())
    allocator.release(page)
    assert allocator.free == 0
    allocator.release(page)
    assert allocator.free == 1


def test_misuse_is_caught() -> None:
    allocator = PageAllocator(2)
    page = allocator.alloc()
    with pytest.raises(AssertionError, match="without can_alloc"):
        allocator.alloc()
    allocator.release(page)
    with pytest.raises(AssertionError):
        allocator.release(page)
    with pytest.raises(AssertionError):
        allocator.share(page)
    with pytest.raises(AssertionError, match="null page"):
        PageAllocator(1)
