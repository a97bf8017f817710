"""The tree against a brute-force model, with real sequences and pools whose entries tell their tokens."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from weft.runtime.cache.capacity import TOKENS_PER_ROW, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.radix import CHAIN_KINDS, ChainKind, RadixTree, as_tokens
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import preset

CONFIG = dataclasses.replace(
    preset("tiny"), num_hidden_layers=2, compress_ratios=(4, 128, 0), sliding_window=8, num_nextn_predict_layers=0
)
SPACES = ("", "other")
# Few tokens and few lengths, so that sequences share, branch and end inside groups and pages.
PIECES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from((1, 2, 3, 4, 5, 64, 127, 128, 130))), min_size=1, max_size=4
)


def spelled(pieces: list[tuple[int, int]]) -> list[int]:
    return [token for token, count in pieces for _ in range(count)]


def content(kind: ChainKind, tokens: list[int], entry: int) -> float:
    """What the entry holds: a number that depends on all tokens up to it."""
    text = bytes(tokens[: (entry + 1) * TOKENS_PER_ROW[kind]])
    return float(zlib.crc32(kind.encode() + text) & 0xFFFFFF)


class Live:
    def __init__(self, state: SequenceState, tokens: list[int], space: str) -> None:
        self.state, self.tokens, self.space = state, tokens, space


class Tree(RuleBasedStateMachine):
    @initialize(page=st.integers(1, 6), tokens=st.sampled_from((600, 4000)))
    def begin(self, page: int, tokens: int) -> None:
        sizes = PoolSizes(tokens=tokens, slots=6, context=1200, burst=600, page=page)
        self.pools = Pools(CONFIG, sizes)
        self.tree = RadixTree(self.pools.allocators, page)
        self.live: list[Live] = []
        self.known: dict[str, set[tuple[int, ...]]] = {space: set() for space in SPACES}
        self.evicted = False

    # -- operations -------------------------------------------------------------------------------------

    @precondition(lambda self: self.pools.free_slots)
    @rule(pieces=PIECES, space=st.sampled_from(SPACES), old=st.integers(0, 9), cut=st.integers(0, 12))
    def open(self, pieces: list[tuple[int, int]], space: str, old: int, cut: int) -> None:
        """A sequence that takes what is known of its tokens and computes the rest. It begins like an old one."""
        others = sorted(self.known[space])
        base = list(others[old % len(others)]) if others else []
        tokens = (base[: max(len(base) - cut, 0)] + spelled(pieces))[:900]
        found = self.tree.match(as_tokens(tokens), space)
        longest = max((common(tokens, other) for other in self.known[space]), default=0)
        assert found.length <= longest if self.evicted else found.length == longest
        state = SequenceState(self.pools)
        state.adopt(self.tree.pages(found), found.length)
        # Raw state plays no part here: it is as if it had been restored at the match.
        state.length = found.length
        self.live.append(Live(state, tokens[: found.length], space))
        self.grow(len(self.live) - 1, tokens[found.length :])

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 5), pieces=PIECES)
    def extend(self, which: int, pieces: list[tuple[int, int]]) -> None:
        self.grow(which % len(self.live), spelled(pieces))

    def grow(self, which: int, tokens: list[int]) -> None:
        """Write the entries that the tokens complete, if there is room for all."""
        own = self.live[which]
        if len(own.tokens) + len(tokens) > 1000 or not self.room(own.state, len(tokens)):
            return
        state, before = own.state, own.state.length
        if not tokens:
            return
        state.reserve(len(tokens))
        own.tokens = own.tokens + tokens
        for kind in CHAIN_KINDS:
            ratio = TOKENS_PER_ROW[kind]
            for entry in range(before // ratio, len(own.tokens) // ratio):
                self.rows(kind)[self.row(state, kind, entry), 0] = content(kind, own.tokens, entry)
        state.commit(len(tokens))

    def room(self, state: SequenceState, count: int) -> bool:
        if state.can_reserve(count):
            return True
        for kind in CHAIN_KINDS:
            need = state.needs(kind, count)
            free = self.pools.allocators[kind].free
            self.evicted = True
            if not self.tree.evict(kind, need):
                assert self.pools.allocators[kind].free >= free
        return state.can_reserve(count)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 5))
    def remember(self, which: int) -> None:
        own = self.live[which % len(self.live)]
        node, new = self.tree.insert(as_tokens(own.tokens), own.state.pages, own.space)
        assert node.end >= len(own.tokens) > node.start or not own.tokens
        assert new <= len(own.tokens)
        self.known[own.space].add(tuple(own.tokens))

    @precondition(lambda self: self.live and self.pools.free_slots)
    @rule(which=st.integers(0, 5))
    def fork(self, which: int) -> None:
        own = self.live[which % len(self.live)]
        self.live.append(Live(own.state.fork(), own.tokens, own.space))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 5))
    def close(self, which: int) -> None:
        self.live.pop(which % len(self.live)).state.close()

    @rule(kind=st.sampled_from(CHAIN_KINDS), count=st.integers(1, 40))
    def evict(self, kind: ChainKind, count: int) -> None:
        allocator = self.pools.allocators[kind]
        wanted = allocator.free + count
        before = self.tree.tokens
        enough = self.tree.evict(kind, wanted)
        assert enough == (allocator.free >= wanted)
        self.evicted |= self.tree.tokens < before

    # -- what always holds ------------------------------------------------------------------------------

    def rows(self, kind: ChainKind) -> np.ndarray:  # type: ignore[type-arg]
        layer = 0 if kind == "c4" else 1
        return self.pools.kv[layer].tensor.numpy()  # type: ignore[attr-defined,no-any-return]

    def row(self, state: SequenceState, kind: ChainKind, entry: int) -> int:
        page, row = divmod(entry, self.pools.sizes.page)
        return int(self.pools.tables[kind][state.slot, page]) + row + self.pools.base[kind]

    @invariant()
    def every_entry_is_that_of_its_tokens(self) -> None:
        for own in getattr(self, "live", ()):
            for kind in CHAIN_KINDS:
                for entry in range(len(own.tokens) // TOKENS_PER_ROW[kind]):
                    got = self.rows(kind)[self.row(own.state, kind, entry), 0]
                    assert got == content(kind, own.tokens, entry)

    @invariant()
    def every_page_has_the_references_it_should(self) -> None:
        if not hasattr(self, "tree"):
            return
        held = self.tree.check()
        for own in self.live:
            held.update((kind, page) for kind in CHAIN_KINDS for page in own.state.pages[kind].values())
        for kind in CHAIN_KINDS:
            holders = self.pools.allocators[kind]._holders
            assert {n: count for n, count in enumerate(holders) if count} == counts(held, kind)
        self.pools.check()

    def teardown(self) -> None:
        for own in getattr(self, "live", ()):
            own.state.close()
        if hasattr(self, "tree"):
            for kind in CHAIN_KINDS:
                allocator = self.pools.allocators[kind]
                assert self.tree.evict(kind, allocator.total) and allocator.free == allocator.total
            assert self.tree.tokens == 0 or all(
                not node.pages[kind] for node in self.tree.nodes() for kind in CHAIN_KINDS
            )


def counts(held: Counter[tuple[ChainKind, int]], kind: ChainKind) -> dict[int, int]:
    return {page: count for (own, page), count in held.items() if own == kind}


def common(left: list[int], right: tuple[int, ...]) -> int:
    size = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        size += 1
    return size


def test_a_random_life() -> None:
    run_state_machine_as_test(
        Tree,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
