"""The two compressors against float64 softmax pooling, and against themselves in other chunks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from support.kernels import U32, assert_rows_stand_alone, assert_within, on_tensors, same_bits
from weft.kernels import compress
from weft.kernels.compress import FoldPlan

fold_c128, pool_c4 = on_tensors(compress.fold_c128), on_tensors(compress.pool_c4)

GROUP = 128
WIDTHS = [1, 3, 33, 64]

Spans = list[tuple[int, int, int]]  # (state slot, position of the first token, tokens)


def pooled(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over dim 0 per channel, in float64, and the bound of a float32 left fold of it.

    Each of N steps rescales (2 roundings), adds, and takes exp of a difference that is off by u of its size; the
    differences of the running maximum telescope to the spread of the scores. That bounds every weight, hence
    numerator and denominator.
    """
    values, scores = values.double(), scores.double()
    weight = torch.exp(scores - scores.amax(0))
    share = weight / weight.sum(0)
    finite = scores[scores.isfinite()]
    spread = float(finite.max() - finite.min())
    relative = (5 * len(scores) + 2 * spread + 10) * U32
    return (share * values).sum(0), 2 * relative * (share * values.abs()).sum(0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_c4_is_close(width: int, spread: float) -> None:
    values, scores = torch.randn(7, 8, 2 * width), torch.randn(7, 8, 2 * width) * spread
    first = torch.tensor([True, False, False, True, False, False, False])
    got = pool_c4(values, scores, first)
    for entry in range(7):
        previous, current = (slice(0, 4), slice(0, width)), (slice(4, 8), slice(width, 2 * width))
        used = [current] if first[entry] else [previous, current]
        value = torch.cat([values[entry][half] for half in used])
        score = torch.cat([scores[entry][half] for half in used])
        assert_within(got[entry], *pooled(value, score))


def test_c4_of_the_first_entry_ignores_the_previous_window() -> None:
    values, scores = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    first = torch.tensor([True, False])
    got = pool_c4(values, scores, first)
    values[:, :4], scores[:, :4] = 1e9, 1e9
    again = pool_c4(values, scores, first)
    assert same_bits(again[0], got[0])
    assert not same_bits(again[1], got[1])


def test_c4_ties_average() -> None:
    values = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 2)
    assert pool_c4(values, torch.zeros(1, 8, 2), torch.tensor([False])).item() == 3.5
    assert pool_c4(values, torch.zeros(1, 8, 2), torch.tensor([True])).item() == 5.5


@pytest.mark.parametrize("width", WIDTHS)
def test_c4_entries_stand_alone(width: int) -> None:
    values, scores = torch.randn(70, 8, 2 * width), torch.randn(70, 8, 2 * width) * 5
    first = torch.rand(70) < 0.3
    assert_rows_stand_alone(pool_c4, values, scores, first)


def test_c4_inputs_are_not_changed() -> None:
    values, scores, first = torch.randn(3, 8, 4), torch.randn(3, 8, 4), torch.tensor([True, False, True])
    kept = values.clone(), scores.clone()
    pool_c4(values, scores, first)
    assert same_bits(values, kept[0])
    assert same_bits(scores, kept[1])
    assert pool_c4(torch.empty(0, 8, 4), torch.empty(0, 8, 4), torch.empty(0).bool()).shape == (0, 2)


def plan_of(spans: Spans) -> FoldPlan:
    """Groups of all spans, the longest first; one loop per field of the plan."""
    groups = []
    row = 0
    for slot, start, count in spans:
        for number in range(start // GROUP, (start + count - 1) // GROUP + 1):
            begin, end = max(start, number * GROUP), min(start + count, (number + 1) * GROUP)
            groups.append((list(range(row + begin - start, row + end - start)), slot, begin, end))
        row += count
    order = sorted(range(len(groups)), key=lambda g: -len(groups[g][0]))
    steps = [[groups[g][0][i] for g in order if i < len(groups[g][0])] for i in range(len(groups[order[0]][0]))]
    closed = [place for g in range(len(groups)) for place in [order.index(g)] if groups[g][3] % GROUP == 0]
    opened = [place for place, g in enumerate(order) if groups[g][3] % GROUP]
    return FoldPlan(
        tuple(np.array(step) for step in steps),
        np.array([groups[g][1] for g in order]),
        np.array([groups[g][2] % GROUP == 0 for g in order]),
        np.array(closed, np.int64),
        np.array(opened, np.int64),
    )


class Sequences:
    """Tokens of several sequences, fed to the fold in any chunks; sequence s keeps its state in slot 2 s + 1."""

    def __init__(self, lengths: list[int], width: int, spread: float = 3.0) -> None:
        self.lengths = lengths
        self.values = [torch.randn(n, width) for n in lengths]
        self.scores = [torch.randn(n, width) * spread for n in lengths]
        self.width = width

    def fresh_state(self) -> Tensor:
        """What a slot held before does not matter."""
        return torch.full((2 * len(self.lengths) + 1, 3, self.width), torch.nan)

    def feed(self, state: Tensor, done: list[int], counts: list[int], entries: list[Tensor]) -> None:
        """The next counts[s] tokens of every sequence in one call."""
        members = [s for s, count in enumerate(counts) if count]
        spans = [(2 * s + 1, done[s], counts[s]) for s in members]
        parts = [slice(done[s], done[s] + counts[s]) for s in members]
        values = torch.cat([self.values[s][part] for s, part in zip(members, parts, strict=True)])
        scores = torch.cat([self.scores[s][part] for s, part in zip(members, parts, strict=True)])
        out = fold_c128(values, scores, state, plan_of(spans))
        for s in members:
            new = (done[s] + counts[s]) // GROUP - done[s] // GROUP
            entries[s] = torch.cat((entries[s], out[:new]))
            out = out[new:]
            done[s] += counts[s]
        assert not len(out)

    def run(self, chunks: list[list[int]]) -> tuple[list[Tensor], Tensor]:
        state, done = self.fresh_state(), [0] * len(self.lengths)
        entries = [torch.empty(0, self.width) for _ in self.lengths]
        for counts in chunks:
            self.feed(state, done, counts, entries)
        assert done == self.lengths
        return entries, state

    def random_chunks(self, longest: int) -> list[list[int]]:
        chunks, left = [], list(self.lengths)
        while any(left):
            counts = [min(n, random.randrange(longest + 1)) for n in left]
            if any(counts):
                chunks.append(counts)
                left = [n - count for n, count in zip(left, counts, strict=True)]
        return chunks

    def open_slots(self) -> list[int]:
        """A slot whose sequence ends with a complete group holds nothing that is read again."""
        return [2 * s + 1 for s, n in enumerate(self.lengths) if n % GROUP]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_c128_is_close(width: int, spread: float) -> None:
    sequences = Sequences([300, 128, 127], width, spread)
    entries, state = sequences.run([sequences.lengths])
    for s, n in enumerate(sequences.lengths):
        assert len(entries[s]) == n // GROUP
        for j in range(n // GROUP):
            group = slice(j * GROUP, (j + 1) * GROUP)
            assert_within(entries[s][j], *pooled(sequences.values[s][group], sequences.scores[s][group]))
        if n % GROUP:
            rest = slice(n // GROUP * GROUP, n)
            top, total, weighted = state[2 * s + 1]
            assert torch.equal(top, sequences.scores[s][rest].amax(0))
            assert_within(weighted / total, *pooled(sequences.values[s][rest], sequences.scores[s][rest]))


@pytest.mark.parametrize("longest", [1, 3, 50, 127, 128, 129, 200])
def test_c128_chunks_do_not_matter(longest: int) -> None:
    """Entries and the state left behind, bit by bit, for any cut of the same tokens."""
    sequences = Sequences([385, 128, 5], 33)
    want, state = sequences.run([sequences.lengths])
    slots = sequences.open_slots()
    for _ in range(2):
        entries, left = sequences.run(sequences.random_chunks(longest))
        assert all(same_bits(got, whole) for got, whole in zip(entries, want, strict=True))
        assert same_bits(left[slots], state[slots])


@pytest.mark.parametrize("width", WIDTHS)
def test_c128_sequences_alone_or_together(width: int) -> None:
    sequences = Sequences([300, 256, 1, 131, 127], width)
    want, state = sequences.run(sequences.random_chunks(150))
    for s, n in enumerate(sequences.lengths):
        counts = [[n if i == s else 0 for i in range(len(sequences.lengths))]]
        alone, left, done = [torch.empty(0, width)] * 5, sequences.fresh_state(), [0] * 5
        sequences.feed(left, done, counts[0], alone)
        assert same_bits(alone[s], want[s])
        if n % GROUP:
            assert same_bits(left[2 * s + 1], state[2 * s + 1])


def test_c128_touches_its_own_open_slots_only() -> None:
    """Slots of other sequences, and of a sequence whose group was just completed, stay as they are."""
    sequences = Sequences([100, 128], 3)
    state = torch.randn(5, 3, 3)
    kept = state.clone()
    sequences.feed(state, [0, 0], [100, 128], [torch.empty(0, 3)] * 2)
    assert not same_bits(state[1], kept[1])
    assert same_bits(state[[0, 2, 3, 4]], kept[[0, 2, 3, 4]])


def test_c128_inputs_are_not_changed() -> None:
    values, scores = torch.randn(140, 3), torch.randn(140, 3)
    kept = values.clone(), scores.clone()
    fold_c128(values, scores, torch.zeros(1, 3, 3), plan_of([(0, 0, 140)]))
    assert same_bits(values, kept[0])
    assert same_bits(scores, kept[1])


def test_c128_of_very_unlike_scores() -> None:
    """A late score far above all others takes everything; one far below adds nothing."""
    values = torch.arange(128.0)[:, None]
    scores = torch.zeros(128, 1)
    scores[100] = 1e4
    entry = fold_c128(values, scores, torch.zeros(1, 3, 1), plan_of([(0, 0, 128)]))
    assert entry.item() == 100.0
    entry = fold_c128(values, -scores, torch.zeros(1, 3, 1), plan_of([(0, 0, 128)]))
    assert entry.item() == pytest.approx((128 * 127 / 2 - 100) / 127, rel=1e-6)


@pytest.mark.parametrize("stale", [np.nan, np.inf, -np.inf])
def test_what_stands_before_the_first_entry_has_no_part_in_it(stale: float) -> None:
    draw = np.random.default_rng(1)
    values, scores = (draw.standard_normal((2, 8, 12), np.float32) for _ in range(2))
    want = pool_c4(values.copy(), scores.copy(), np.array([True, False]))
    values[0, :4], scores[0, :4] = stale, stale
    assert np.array_equal(pool_c4(values, scores, np.array([True, False])), want)
