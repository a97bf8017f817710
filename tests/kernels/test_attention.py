"""Sparse attention against float64 loops, and a query's bits apart from everything around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from support.kernels import (
    ROWS,
    U32,
    assert_rows_stand_alone,
    assert_within,
    differing_windows,
    gamma,
    on_tensors,
    same_bits,
    threads,
)
from weft.kernels import attention
from weft.kernels.attention import KeyList
from weft.kernels.kv_rows import DenseRows

sparse_attention = on_tensors(attention.sparse_attention)


def key_list(index: Tensor, tile: int) -> KeyList:
    return KeyList.of(index.numpy(), tile)


# (queries, heads, width, keys per tile, tiles)
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 2, 3, 1, 3),
    (5, 4, 33, 5, 2),
    (7, 4, 64, 32, 3),
    (2, 3, 128, 64, 2),
    (4, 8, 64, 40, 1),
    (2, 64, 512, 128, 1),
]
# Widths whose rows all start at a multiple of 16 bytes, as MKL needs for reproducible sums.
INVARIANT = [(4, 64, 32, 1), (4, 64, 40, 1), (4, 64, 32, 3), (1, 16, 7, 2), (3, 128, 1, 5), (8, 128, 128, 2)]
Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
ALL_MASKED = 1  # the query of every case that sees no key


class Case:
    """Random queries over a pool; `index` has -1 where there is no key."""

    def __init__(self, tokens: int, heads: int, dim: int, tile: int, tiles: int, dtype: torch.dtype) -> None:
        self.q = torch.randn(tokens, heads, dim)
        self.pool = torch.randn(3 * tile * tiles + 5, dim).to(dtype)
        self.pool[0] = 0
        self.sink = torch.randn(heads)
        self.scale = dim**-0.5
        self.tile = tile
        self.index = torch.randint(1, self.pool.shape[0], (tokens, tile * tiles))
        self.index[torch.rand(self.index.shape) < 0.3] = -1
        if tokens > ALL_MASKED:
            self.index[ALL_MASKED] = -1

    def run(self, q: Tensor, index: Tensor, pool: Tensor | None = None) -> Tensor:
        rows = DenseRows(self.pool if pool is None else pool)
        return sparse_attention(q, rows, key_list(index, self.tile), self.sink, self.scale)

    @property
    def result(self) -> Tensor:
        return self.run(self.q, self.index)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Result and its error bound, one head of one query at a time.

    A logit is off by gamma(d + 1) of its absolute terms and by u when the maximum is taken off; exp turns that
    into a relative error of the weight and adds 2 u. Numerator and denominator then sum N + 1 terms.
    """
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    bound = torch.zeros_like(out)
    terms = case.index.shape[1] + 4
    for t, listed in enumerate(case.index.tolist()):
        keys = case.pool[[row for row in listed if row >= 0]].double()
        for h, sink in enumerate(case.sink.double().tolist()):
            query = case.q[t, h].double()
            logits = [case.scale * float(query @ key) for key in keys]
            size = max([case.scale * float(query.abs() @ key.abs()) for key in keys], default=0.0)
            top = max([*logits, sink])
            weights = [math.exp(logit - top) for logit in logits]
            total = math.fsum([*weights, math.exp(sink - top)])
            spread = top - min([*logits, sink])
            relative = math.expm1(2 * gamma(query.numel() + 1) * size) + (spread + 3) * U32 + gamma(terms)
            for weight, key in zip(weights, keys, strict=True):
                out[t, h] += weight / total * key
                bound[t, h] += weight / total * key.abs() * 2 * relative
    return out, bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(*shape, dtype)
    got = case.result
    assert got.dtype == torch.float32
    assert_within(got, *exact(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_without_keys_gives_zeros(dtype: torch.dtype) -> None:
    case = Case(4, 3, 20, 6, 2, dtype)
    assert not case.result[ALL_MASKED].any()


def test_extreme_logits() -> None:
    """One key above all others is returned as it is, a sink above all of them returns nothing."""
    pool = torch.tensor([[0.0, 0.0], [3.0, 0.5], [-3.0, 0.25], [2.0, 8.0]])
    keys = key_list(torch.tensor([[1, 2, 3, -1]]), 2)
    q = torch.tensor([[[1e30, 0.0]]])
    assert sparse_attention(q, DenseRows(pool), keys, torch.zeros(1), 1.0).tolist() == [[[3.0, 0.5]]]
    assert sparse_attention(-q, DenseRows(pool), keys, torch.zeros(1), 1.0).tolist() == [[[-3.0, 0.25]]]
    assert sparse_attention(q, DenseRows(pool), keys, torch.tensor([3e38]), 1.0).tolist() == [[[0.0, 0.0]]]


def test_ties_share_the_weight_and_the_sink_takes_its_part() -> None:
    pool = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 5.0]])
    q = torch.ones(1, 1, 2)
    q[..., 1] = 0
    keys = key_list(torch.tensor([[1, 2, 3]]), 1)
    without = sparse_attention(q, DenseRows(pool), keys, torch.tensor([-torch.inf]), 1.0)
    assert without[0, 0, 1].item() == pytest.approx(7 / 3, rel=1e-6)
    with_sink = sparse_attention(q, DenseRows(pool), keys, torch.tensor([0.0]), 1.0)
    assert with_sink[0, 0].tolist() == [0.0, 7 / 4]


def test_a_key_listed_twice_counts_twice() -> None:
    pool = torch.tensor([[0.0], [1.0], [4.0]])
    keys = key_list(torch.tensor([[1, 1, 2]]), 3)
    got = sparse_attention(torch.zeros(1, 1, 1), DenseRows(pool), keys, torch.tensor([0.0]), 1.0)
    assert got.item() == 1.5


def test_key_list_of_an_index() -> None:
    keys = key_list(torch.tensor([[5, -1, 0, -1]]), 2)
    assert keys.index.tolist() == [5, 0, 0, 0]
    assert keys.bias.tolist() == [[[0.0, -torch.inf, 0.0, -torch.inf]]]
    with pytest.raises(AssertionError):
        key_list(torch.zeros(1, 5, dtype=torch.int64), 2)


@pytest.mark.parametrize("shape", INVARIANT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_stand_alone(shape: Shape, dtype: torch.dtype) -> None:
    case = Case(ROWS, *shape, dtype)
    assert_rows_stand_alone(case.run, case.q, case.index)


def test_queries_of_the_released_model_stand_alone() -> None:
    case = Case(40, 64, 512, 128, 2, torch.bfloat16)
    assert_rows_stand_alone(case.run, case.q, case.index)


@pytest.mark.parametrize("shape", INVARIANT)
def test_query_blocks_change_nothing(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(23, *shape, torch.float32)
    whole = case.result
    per_query = 4 * case.q.shape[2] * case.index.shape[1]
    for queries in (1, 2, 3, 7, 22, 23):
        monkeypatch.setattr(attention, "_BLOCK_BYTES", queries * per_query)
        assert same_bits(case.result, whole), queries


@pytest.mark.parametrize("shape", INVARIANT)
def test_empty_tiles_behind_change_nothing(shape: Shape) -> None:
    """A batch is as wide as its longest member, whose tiles are empty for the others."""
    case = Case(9, *shape, torch.float32)
    whole = case.result
    for tiles in (1, 2, 7):
        wide = torch.cat((case.index, torch.full((9, tiles * case.tile), -1)), 1)
        assert same_bits(case.run(case.q, wide), whole), tiles


@pytest.mark.parametrize("shape", INVARIANT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_placement_does_not_matter(shape: Shape, dtype: torch.dtype) -> None:
    """The same rows elsewhere in another pool, all else in it random."""
    case = Case(9, *shape, dtype)
    rows = case.pool.shape[0]
    place = torch.randperm(4 * rows)[:rows] + 1
    place[0] = 0
    other = torch.randn(4 * rows + 1, case.pool.shape[1]).to(dtype)
    other[place] = case.pool
    moved = torch.where(case.index < 0, -1, place[case.index.clamp_min(0)])
    assert same_bits(case.run(case.q, moved, other), case.result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_queries_do_not_matter(dtype: torch.dtype) -> None:
    """Neither how many keys they have, nor which, nor their values, nor an infinite result."""
    case = Case(8, 4, 64, 32, 3, dtype)
    mine = case.result[:1]
    for count in (0, 1, 31, 96):
        others = torch.randint(1, case.pool.shape[0], (7, 96))
        others[:, count:] = -1
        q = torch.cat((case.q[:1], torch.randn(7, 4, 64) * 1e20))
        assert same_bits(case.run(q, torch.cat((case.index[:1], others)))[:1], mine), count


def test_masked_slots_do_not_matter() -> None:
    """A key stays in its slot; what lies in slots without a key is multiplied by an exact zero."""
    case = Case(6, 4, 64, 32, 2, torch.float32)
    keys = key_list(case.index, case.tile)
    junk = torch.where(
        case.index < 0, torch.randint(1, case.pool.shape[0], case.index.shape), keys.index.view_as(case.index)
    )
    other = sparse_attention(
        case.q, DenseRows(case.pool), KeyList(junk.flatten(), keys.bias, case.tile), case.sink, case.scale
    )
    assert same_bits(other, case.result)


def test_two_threads() -> None:
    for shape in ((4, 64, 32, 3), (1, 16, 7, 2), (64, 512, 128, 1)):
        case = Case(20, *shape, torch.float32)
        one = case.result
        with threads(2):
            assert differing_windows(case.run, case.q, case.index, sizes=(1, 2, 3, 8, 17)) == []
            assert_within(case.result, one.double(), 1e-5)


def test_inputs_are_not_changed() -> None:
    case = Case(5, 2, 16, 4, 2, torch.float32)
    kept = [x.clone() for x in (case.q, case.pool, case.index, case.sink)]
    assert case.result.isfinite().all()
    for before, after in zip(kept, (case.q, case.pool, case.index, case.sink), strict=True):
        assert same_bits(before, after)
