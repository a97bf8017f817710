"""A radix tree over token sequences that holds the entry pages of what it has seen.

A node stands for a stretch of tokens and holds one reference to each page with entries that the stretch completes.
A page on the border of two stretches is held by both; the deeper one's copy has the entries of all before it too,
because it comes from a sequence that had them. So a match may end at any token: the pages up to it are shared, and
whoever writes behind it copies the last one first (`SequenceState.reserve`).

The tree knows nothing of raw state; its pages are let go by use alone, the least recently used end first.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft.runtime.cache.capacity import TOKENS_PER_ROW, PageKind
from weft.runtime.cache.pages import PageAllocator

Tokens = NDArray[np.int32]
ChainKind = Literal["c4", "c128"]
CHAIN_KINDS: tuple[ChainKind, ...] = ("c4", "c128")
# Of a longer end only this much is let go at a time.
_PIECE = 4096
# A node remembers this many of the ways on from it that were let go, the last ones.
_REMEMBERED = 64


def as_tokens(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, np.int32)


class Node:
    """Tokens start .. end of the sequences below it. pages: by kind, logical number -> page. marks: what others
    keep at cuts, start < cut <= end; it goes where the cut goes. gone: first tokens of children let go."""

    __slots__ = ("children", "gone", "label", "marks", "pages", "parent", "start", "used")

    def __init__(self, label: Tokens, start: int, parent: Node | None) -> None:
        self.label = label
        self.start = start
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.pages: dict[ChainKind, dict[int, int]] = {kind: {} for kind in CHAIN_KINDS}
        self.marks: dict[int, Any] = {}
        self.gone: dict[int, None] = {}
        self.used = 0

    @property
    def end(self) -> int:
        return self.start + len(self.label)

    def path(self) -> list[Node]:
        """From below the root to this node."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match(NamedTuple):
    """The first `length` tokens are those on the path to `node`, which may end later."""

    node: Node
    length: int


class RadixTree:
    """Trees of several namespaces over the same pages; what one holds is never found from another."""

    def __init__(
        self,
        allocators: Mapping[PageKind, PageAllocator],
        page: int,
        forget: Callable[[Any], None] = lambda mark: None,
    ) -> None:
        """page: rows of a page. forget: called with each mark of what is let go."""
        self._forget = forget
        self._allocators = allocators
        self._page = page
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._order = itertools.count()
        self._held: dict[ChainKind, Counter[int]] = {kind: Counter() for kind in CHAIN_KINDS}
        self._ends: list[tuple[int, int, Node]] = []  # (used, order, end of a path); entries may be out of date
        self.tokens = 0

    # -- finding ----------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, namespace: str = "") -> Match:
        """The longest known prefix. Counts as a use of it."""
        found = self.look(tokens, namespace)
        self._touch(found.node)
        return found

    def look(self, tokens: Tokens, namespace: str = "") -> Match:
        """`match` that leaves no trace."""
        node = self._roots.get(namespace)
        if node is None:
            return Match(Node(tokens[:0], 0, None), 0)
        at = 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            same = common_prefix(child.label, tokens[at:])
            at, node = at + same, child
            if same < len(child.label):
                break
        return Match(node, at)

    def pages(self, found: Match) -> dict[PageKind, dict[int, int]]:
        """Logical number -> page of every entry below the match's length. The tree still owns its references."""
        out: dict[PageKind, dict[int, int]] = {}
        for kind in CHAIN_KINDS:
            numbers = self._numbers(kind, 0, found.length)
            own: dict[int, int] = {}
            for node in found.node.path():
                own.update(node.pages[kind])
            out[kind] = {number: own[number] for number in numbers}
        return out

    def was_let_go(self, found: Match, tokens: Tokens) -> bool:
        """Whether more of `tokens` than the match was known once; of old times it remembers little."""
        node, length = found
        return length == node.end and length < len(tokens) and int(tokens[length]) in node.gone

    # -- growing ----------------------------------------------------------------------------------------

    def insert(
        self, tokens: Tokens, pages: Mapping[PageKind, Mapping[int, int]], namespace: str = ""
    ) -> tuple[Node, int]:
        """Know `tokens`, whose entries are in `pages` (a sequence's). Returns the node in which they end, and how
        many of them were new."""
        self._roots.setdefault(namespace, Node(tokens[:0], 0, None))
        node, length = self.look(tokens, namespace)
        if length < len(tokens):
            if length < node.end:
                node = self._split(node, length)
            leaf = Node(tokens[length:].copy(), length, node)
            for kind in CHAIN_KINDS:
                numbers = self._numbers(kind, length, len(tokens))
                leaf.pages[kind] = {n: self._hold(kind, pages[kind][n]) for n in numbers}
            node.children[int(tokens[length])] = leaf
            node.gone.pop(int(tokens[length]), None)
            self.tokens += len(leaf.label)
            node = leaf
        self._touch(node)
        return node, len(tokens) - length

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node in two; returns the upper one, which ends at `at`."""
        parent = node.parent
        assert parent is not None and node.start < at < node.end
        upper = Node(node.label[: at - node.start], node.start, parent)
        upper.used = node.used
        parent.children[int(node.label[0])] = upper
        node.label, node.start, node.parent = node.label[at - node.start :], at, upper
        upper.children[int(node.label[0])] = node
        upper.marks = {cut: mark for cut, mark in node.marks.items() if cut <= at}
        node.marks = {cut: mark for cut, mark in node.marks.items() if cut > at}
        for kind in CHAIN_KINDS:
            own = node.pages[kind]
            above = self._numbers(kind, upper.start, at)
            below = self._numbers(kind, at, node.end)
            upper.pages[kind] = {n: own[n] for n in above}
            node.pages[kind] = {n: own[n] for n in below}
            for n in set(above) & set(below):
                self._hold(kind, own[n])
        return upper

    def _hold(self, kind: ChainKind, page: int) -> int:
        self._held[kind][page] += 1
        return self._allocators[kind].share(page)

    def _touch(self, node: Node) -> None:
        now = next(self._clock)
        for part in node.path():
            part.used = now
        self._note_end(node)

    def _note_end(self, node: Node) -> None:
        if node.parent is not None and not node.children:
            heapq.heappush(self._ends, (node.used, next(self._order), node))

    # -- letting go -------------------------------------------------------------------------------------

    def evict(self, kind: ChainKind, count: int) -> bool:
        """Let ends of paths go until `count` pages of the kind are free; False if that is not to be had. Ends that
        would free no page stay."""
        allocator = self._allocators[kind]
        kept: list[tuple[int, int, Node]] = []
        while not allocator.can_alloc(count) and (entry := self._pop_end()):
            if self._frees(entry[2], kind):
                self._drop_end(entry[2])
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._ends, entry)
        return allocator.can_alloc(count)

    def drop_oldest(self) -> bool:
        """Let the end used longest ago go, even if its pages have other holders; False if there is none."""
        entry = self._pop_end()
        if entry is not None:
            self._drop_end(entry[2])
        return entry is not None

    def _pop_end(self) -> tuple[int, int, Node] | None:
        """The entry of the end used longest ago; those out of date are skipped."""
        while self._ends:
            used, _, node = entry = heapq.heappop(self._ends)
            if not node.children and node.used == used and node.parent is not None:
                return entry
        return None

    def _frees(self, node: Node, kind: ChainKind) -> bool:
        """Whether the path up to here has a page of the kind that only the tree holds; those above go later."""
        holders, held = self._allocators[kind].holders, self._held[kind]
        return any(holders(page) == held[page] for part in node.path() for page in part.pages[kind].values())

    def _drop_end(self, node: Node) -> None:
        if len(node.label) > _PIECE:
            self._split(node, node.end - _PIECE)
        parent = node.parent
        assert parent is not None
        first = int(node.label[0])
        del parent.children[first]
        parent.gone[first] = None
        if len(parent.gone) > _REMEMBERED:
            del parent.gone[next(iter(parent.gone))]
        node.parent = None
        self.tokens -= len(node.label)
        for mark in node.marks.values():
            self._forget(mark)
        for kind in CHAIN_KINDS:
            for page in node.pages[kind].values():
                self._allocators[kind].release(page)
                self._held[kind][page] -= 1
        self._note_end(parent)

    # -- keeping in order -------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def check(self) -> Counter[tuple[ChainKind, int]]:
        """Invariants; raises AssertionError. Returns how often the tree holds each page."""
        held: Counter[tuple[ChainKind, int]] = Counter()
        total = 0
        for node in self.nodes():
            parent = node.parent
            assert parent is not None and len(node.label) > 0
            assert parent.children[int(node.label[0])] is node and node.start == parent.end
            assert node.used <= parent.used or parent.parent is None
            assert all(node.start < cut <= node.end for cut in node.marks)
            assert not node.gone.keys() & node.children.keys()
            total += len(node.label)
            for kind in CHAIN_KINDS:
                assert set(node.pages[kind]) == set(self._numbers(kind, node.start, node.end))
                held.update((kind, page) for page in node.pages[kind].values())
        assert total == self.tokens
        assert held == Counter({(k, page): n for k in CHAIN_KINDS for page, n in self._held[k].items() if n})
        return held

    def _numbers(self, kind: ChainKind, start: int, end: int) -> range:
        """Logical pages of the entries that tokens start .. end complete."""
        ratio = TOKENS_PER_ROW[kind]
        first, last = start // ratio, end // ratio
        return range(first // self._page, -(-last // self._page)) if first < last else range(0)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Length of the common prefix."""
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size
