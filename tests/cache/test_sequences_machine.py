"""Any interleaving of opening, appending, forking and closing gives the logits of a cold run.

Between steps, memory that nobody holds is filled with NaN, so reading what is not one's own shows.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from support.engine import free, small_model, some_tokens
from support.pools import poison
from support.run import pools_for, step
from weft.runtime.cache.capacity import KINDS, TOKENS_PER_ROW, IndexFormat, KvFormat, PageKind, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState

MODEL = small_model(0, 4, 128)
CONTEXT, SLOTS = 400, 5
LENGTHS = st.integers(1, 5) | st.sampled_from((15, 16, 17, 127, 128, 129)) | st.integers(1, 160)


class Live:
    """An open sequence, its tokens, the logits of each, and its state as it last wrote it."""

    def __init__(self, state: SequenceState, tokens: list[int], logits: list[Tensor]) -> None:
        self.state, self.tokens, self.logits = state, tokens, logits
        self.bits = bits(state)


class Sequences(RuleBasedStateMachine):
    def __init__(self, page: int, kv: KvFormat, index: IndexFormat) -> None:
        super().__init__()
        sizes = PoolSizes(tokens=SLOTS * CONTEXT, slots=SLOTS, context=CONTEXT, burst=2 * CONTEXT, page=page)
        self.kv, self.index = kv, index
        self.pools = Pools(MODEL.config, sizes, kv_format=kv, index_format=index)
        self.live: list[Live] = []
        self.draws = Random(page)
        poison(self.pools)

    def pick(self, number: int) -> Live:
        return self.live[number % len(self.live)]

    @precondition(lambda self: self.pools.free_slots)
    @rule()
    def open(self) -> None:
        self.live.append(Live(SequenceState(self.pools), [], []))

    @precondition(lambda self: self.live)
    @rule(work=st.lists(st.tuples(st.integers(0, SLOTS - 1), LENGTHS), min_size=1, max_size=3))
    def append(self, work: list[tuple[int, int]]) -> None:
        """To several sequences in one step."""
        counts = {number % len(self.live): count for number, count in work}
        chosen = [(self.live[i], min(n, CONTEXT - self.live[i].state.length)) for i, n in counts.items()]
        parts = [(one, some_tokens(n, self.draws.randrange(1 << 30))) for one, n in chosen if n > 0]
        assert all(one.state.can_reserve(len(part)) for one, part in parts), "the pools hold them all"
        if parts:
            for (one, part), streams in zip(
                parts, step(MODEL, [(one.state, part) for one, part in parts]), strict=True
            ):
                one.tokens.extend(part)
                one.logits.append(MODEL.logits(streams))
                one.bits = bits(one.state)

    @precondition(lambda self: self.live and self.pools.free_slots)
    @rule(number=st.integers(0, SLOTS - 1))
    def fork(self, number: int) -> None:
        parent = self.pick(number)
        child = Live(parent.state.fork(), list(parent.tokens), list(parent.logits))
        assert same(child.bits, parent.bits)
        self.live.append(child)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, SLOTS - 1))
    def close(self, number: int) -> None:
        one = self.pick(number)
        self.live.remove(one)
        self.verify(one)
        one.state.close()

    def verify(self, one: Live) -> None:
        if one.tokens:
            cold = SequenceState(pools_for(MODEL, [one.tokens], kv=self.kv, index=self.index))
            (streams,) = step(MODEL, [(cold, one.tokens)])
            assert torch.equal(torch.cat(one.logits), MODEL.logits(streams))

    @invariant()
    def nobody_changes_anothers_state(self) -> None:
        poison(self.pools)
        for one in self.live:
            assert same(bits(one.state), one.bits)

    @invariant()
    def pages_are_those_the_lengths_need(self) -> None:
        self.pools.check()
        size, window = self.pools.sizes.page, MODEL.config.sliding_window
        for kind in KINDS:
            for one in self.live:
                length = one.state.length
                first = max(0, length - window) if kind == "window" else 0
                rows = range(first, length // TOKENS_PER_ROW[kind])
                assert set(one.state.pages[kind]) == {row // size for row in rows}
            held = {page for one in self.live for page in one.state.pages[kind].values()}
            allocator = self.pools.allocators[kind]
            assert allocator.free == allocator.total - len(held)

    def teardown(self) -> None:
        while self.live:
            self.close(0)
        assert free(self.pools)


def bits(state: SequenceState) -> list[Tensor]:
    """Copies of all that later tokens of this sequence can read."""
    pools, slot = state.pools, state.slot
    size, window = pools.sizes.page, pools.config.sliding_window

    def rows(kind: PageKind) -> Tensor:
        first = max(0, state.length - window) if kind == "window" else 0
        entries = torch.arange(first, state.length // TOKENS_PER_ROW[kind])
        return pools.tables[kind][slot, entries // size] + entries % size

    out = [pools.streams[slot].clone(), pools.c4_tail[:, slot].clone(), pools.c128_fold[:, slot].clone()]
    for kv, layer in zip(pools.kv, pools.config.layer_kinds, strict=False):
        out.append(kv.gather(rows("window")))
        if layer != "window":
            kind: PageKind = "c4" if layer == "c4a" else "c128"
            out.append(kv.gather(rows(kind) + pools.base[kind]))
    return out + [keys.gather(rows("c4")) for keys in pools.index_keys]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(own, other) for own, other in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("page", "kv", "index"),
    [
        (1, "model", "model"),
        (2, "fp8", "fp4"),
        (7, "model", "model"),
        (16, "fp8", "fp8"),
        (64, "model", "model"),
    ],
)
def test_sequences(page: int, kv: KvFormat, index: IndexFormat) -> None:
    run_state_machine_as_test(
        lambda: Sequences(page, kv, index),
        settings=settings(max_examples=20, stateful_step_count=16, suppress_health_check=[HealthCheck.too_slow]),
    )
