"""The radix tree at size: match, insert and evict of a 100k-token prompt in a tree that holds 1M tokens.

    python benchmarks/radix.py

Milliseconds, medians over repeats. Converting the prompt from a list of ints is part of a match.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from support.record import record
from weft.runtime.cache.capacity import KINDS, TOKENS_PER_ROW, PageKind
from weft.runtime.cache.pages import PageAllocator
from weft.runtime.cache.radix import RadixTree, as_tokens

PAGE = 32
HELD = 1_000_000
SHARED = 20_000
REPEATS = 15


class Scene:
    """A tree filled with prompts of `length` tokens that share their first tokens in groups."""

    def __init__(self, length: int, seed: int) -> None:
        self.draw = random.Random(seed)
        pages = 2 * (HELD + 4 * length) // PAGE
        self.allocators: dict[PageKind, PageAllocator] = {kind: PageAllocator(pages) for kind in KINDS}
        self.tree = RadixTree(self.allocators, PAGE)
        self.common = self.prompt(SHARED)
        while self.tree.tokens < HELD:
            self.insert(self.common[: self.draw.randrange(SHARED)] + self.prompt(length // 4))

    def prompt(self, length: int) -> list[int]:
        return self.draw.choices(range(129_280), k=length)

    def insert(self, tokens: list[int]) -> None:
        """As a sequence does: it shares what is known, has pages of its own for the rest, and closes."""
        known = as_tokens(tokens)
        pages = self.tree.pages(self.tree.match(known))
        own: dict[PageKind, dict[int, int]] = {}
        fresh: list[tuple[PageKind, int]] = []
        for kind in ("c4", "c128"):
            need = -(-(len(tokens) // TOKENS_PER_ROW[kind]) // PAGE)
            own[kind] = dict(pages[kind])
            for number in range(need):
                if number not in own[kind]:
                    own[kind][number] = self.allocators[kind].alloc()
                    fresh.append((kind, own[kind][number]))
        self.tree.insert(known, own)
        for kind, page in fresh:
            self.allocators[kind].release(page)


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def measure(length: int) -> dict[str, float]:
    """Of a prompt of `length` tokens, the first of them shared: new, then known, then evicted."""
    scene = Scene(length, 1)
    tree, allocators = scene.tree, scene.allocators
    times: dict[str, list[float]] = {"match": [], "insert": [], "match again": [], "evict": []}
    for _ in range(REPEATS):
        tokens = scene.common[: SHARED // 2] + scene.prompt(length - SHARED // 2)
        times["match"].append(milliseconds(lambda own=tokens: tree.match(as_tokens(own))))  # type: ignore[misc]
        times["insert"].append(milliseconds(lambda own=tokens: scene.insert(own)))  # type: ignore[misc]
        times["match again"].append(milliseconds(lambda own=tokens: tree.match(as_tokens(own))))  # type: ignore[misc]
        wanted = allocators["c4"].free + length // 4 // PAGE
        times["evict"].append(milliseconds(lambda count=wanted: tree.evict("c4", count)))  # type: ignore[misc]
        tree.check()
    return {name: round(statistics.median(own), 3) for name, own in times.items()}


def main() -> None:
    record("radix", {f"{length:,} tokens": measure(length) for length in (25_000, 50_000, 100_000, 200_000)})


if __name__ == "__main__":
    main()
