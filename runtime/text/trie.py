"""A radix trie over characters: which of many texts does this one begin with?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class TextTrie(Generic[V]):
    """Texts with a value each, at most `limit` of them; beyond it the least recently used falls out.

    Every operation takes time linear in the text it is given, however many texts are held and however they share
    beginnings, and shared beginnings are stored once. `put` and `longest_prefix` count as use.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1, "room for the text just put"
        self._limit = limit
        self._root: _Node[V] = _Node("", None)
        self._used: OrderedDict[_Node[V], V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def values(self) -> Iterator[V]:
        """Least recently used first."""
        return iter(self._used.values())

    def get(self, text: str) -> V | None:
        """The value of exactly this text."""
        node, length = self._deepest(text)
        return self._used.get(node) if length == len(text) else None

    def longest_prefix(self, text: str) -> tuple[int, V] | None:
        """The longest text held that `text` begins with: its length, and its value."""
        for length, node in self._path(text):
            self._used.move_to_end(node)
            return length, self._used[node]
        return None

    def prefixes(self, text: str) -> Iterator[tuple[int, V]]:
        """Every text held that `text` begins with, longest first; none counts as used."""
        return ((length, self._used[node]) for length, node in self._path(text))

    def put(self, text: str, value: V) -> list[V]:
        """Set the value of a text; returns what fell out, for its owner to release."""
        node, at = self._deepest(text)
        if at < len(text):
            node = node.grow(text, at)
        self._used[node] = value
        self._used.move_to_end(node)
        if len(self._used) <= self._limit:
            return []
        oldest, fallen = self._used.popitem(last=False)
        self._prune(oldest)
        return [fallen]

    def remove(self, text: str) -> V:
        """Forget one text; KeyError if it is not held."""
        node, length = self._deepest(text)
        if length < len(text) or node not in self._used:
            raise KeyError(text)
        value = self._used.pop(node)
        self._prune(node)
        return value

    def _path(self, text: str) -> Iterator[tuple[int, _Node[V]]]:
        """Nodes with a value on the way of `text`, deepest first."""
        node: _Node[V] | None
        node, length = self._deepest(text)
        while node is not None:
            if node in self._used:
                yield length, node
            length -= len(node.label)
            node = node.parent

    def _deepest(self, text: str) -> tuple[_Node[V], int]:
        """The last node whose whole label lies on the way of `text`, and the characters up to its end."""
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None or not text.startswith(child.label, at):
                break
            node, at = child, at + len(child.label)
        return node, at

    def _prune(self, node: _Node[V]) -> None:
        """`node` has lost its value: every node but the root has one, or a fork, once this is done."""
        if not node.children and node.parent is not None:
            del node.parent.children[node.label[0]]
            node = node.parent
        if node.parent is not None and node not in self._used and len(node.children) == 1:
            node.merge()

    def check(self) -> None:
        """Assert the invariants; for tests."""
        nodes = [self._root]
        for node in nodes:
            for first, child in node.children.items():
                assert child.parent is node and child.label and child.label[0] == first
            if node is not self._root:
                assert node in self._used or len(node.children) > 1, f"{node.label!r} is needed by nothing"
            nodes += node.children.values()
        assert set(self._used) <= set(nodes) and len(self._used) <= self._limit


class _Node(Generic[V]):
    """Stands for the labels from the root to here, joined. Siblings differ in their label's first character."""

    __slots__ = ("children", "label", "parent")

    def __init__(self, label: str, parent: _Node[V] | None) -> None:
        self.label = label
        self.parent = parent
        self.children: dict[str, _Node[V]] = {}

    def grow(self, text: str, at: int) -> _Node[V]:
        """The node of `text`, made below this one, which stands for text[:at] and is the deepest to lie on it."""
        base = self
        child = self.children.get(text[at])
        if child is not None:
            common = _common_length(child.label, text, at)
            base = _Node(child.label[:common], self)
            self.children[text[at]] = base
            child.label = child.label[common:]
            child.parent = base
            base.children[child.label[0]] = child
            at += common
        if at == len(text):
            return base
        leaf = _Node(text[at:], base)
        base.children[leaf.label[0]] = leaf
        return leaf

    def merge(self) -> None:
        """Put the only child in this node's place."""
        assert self.parent is not None
        (child,) = self.children.values()
        child.label = self.label + child.label
        child.parent = self.parent
        self.parent.children[child.label[0]] = child


def _common_length(label: str, text: str, at: int) -> int:
    """Characters that `label` and text[at:] begin with alike: by halves, since a loop over characters is slow."""
    low, high = 0, min(len(label), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(label[low:middle], at + low):
            low = middle
        else:
            high = middle - 1
    return low
