"""Index scores against float64 loops, and their bits apart from the shape of the call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.kernels import assert_within, gamma, same_bits, threads
from weft.kernels import indexer
from weft.kernels.indexer import COLUMNS, block_rows


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    scores = indexer.index_scores(q.numpy(), weights.numpy(), keys)
    return torch.from_numpy(scores)


# (heads, dim)
SHAPES = [(16, 32), (64, 128), (5, 33), (1, 16), (3, 64), (4, 32), (2, 1)]
# The presets: a whole number of rows of the product per query, and rows that start at multiples of 16 bytes.
PRESETS = [(16, 32), (64, 128)]


def draw(blocks: int, queries: int, heads: int, dim: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.randn(blocks, queries, heads)
    return torch.randn(blocks, queries, heads, dim), weights, torch.randn(blocks, columns, dim)


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_close_to_float64(heads: int, dim: int) -> None:
    """A product of dim terms, relu (which adds no error), the weight, and a sum over heads."""
    queries = block_rows(heads) + 1
    q, weights, keys = draw(2, queries, heads, dim, COLUMNS)
    exact = torch.zeros(2, queries, COLUMNS, dtype=torch.float64)
    terms = torch.zeros_like(exact)
    for b in range(2):
        for i in range(queries):
            for h in range(heads):
                weight = weights[b, i, h].double()
                exact[b, i] += weight * (keys[b].double() @ q[b, i, h].double()).clamp(min=0)
                terms[b, i] += weight.abs() * (keys[b].double().abs() @ q[b, i, h].double().abs())
    assert_within(index_scores(q, weights, keys), exact, gamma(dim + heads + 1) * terms)


def test_each_block_reads_its_own_keys() -> None:
    q, weights, keys = draw(3, 2, 8, 16, COLUMNS)
    whole = index_scores(q, weights, keys)
    assert whole.shape == (3, 2, COLUMNS)
    keys[1] = torch.randn(COLUMNS, 16)
    changed = index_scores(q, weights, keys)
    assert same_bits(changed[0], whole[0])
    assert same_bits(changed[2], whole[2])
    assert not same_bits(changed[1], whole[1])


def test_a_negative_product_scores_zero() -> None:
    q = -torch.ones(1, 1, 8, 4)
    assert not index_scores(q, torch.ones(1, 1, 8), torch.ones(1, COLUMNS, 4)).any()


def assert_shape_of_the_call_does_not_matter(heads: int, dim: int, blocks: int = 4) -> None:
    """Blocks alone, fewer columns, fewer or repeated queries per block."""
    least = block_rows(heads)
    for queries in (least, 2 * least, 16 * least):
        for columns in (COLUMNS, 3 * COLUMNS, 8 * COLUMNS):
            q, weights, keys = draw(blocks, queries, heads, dim, columns)
            whole = index_scores(q, weights, keys)
            where = (heads, dim, queries, columns)
            for b in range(blocks):
                alone = index_scores(q[b : b + 1].clone(), weights[b : b + 1].clone(), keys[b : b + 1].clone())
                assert same_bits(alone[0], whole[b]), where
            for kept in range(COLUMNS, columns, COLUMNS):
                assert same_bits(index_scores(q, weights, keys[:, :kept]), whole[:, :, :kept]), where
            for first in range(0, queries, least):
                part = slice(first, first + least)
                few = index_scores(q[:, part].clone(), weights[:, part].clone(), keys)
                assert same_bits(few, whole[:, part]), where
            repeated = index_scores(q[:, -1:].repeat(1, least, 1, 1), weights[:, -1:].repeat(1, least, 1), keys)
            assert same_bits(repeated[:, 0], whole[:, -1]), where


@pytest.mark.parametrize(("heads", "dim"), [*PRESETS, (3, 64), (4, 32), (8, 16)])
def test_shape_of_the_call_does_not_matter(heads: int, dim: int) -> None:
    assert_shape_of_the_call_does_not_matter(heads, dim)


@pytest.mark.parametrize(("heads", "dim"), PRESETS)
def test_two_threads(heads: int, dim: int) -> None:
    with threads(2):
        assert_shape_of_the_call_does_not_matter(heads, dim, blocks=2)


def test_place_of_a_query_in_its_block_does_not_matter() -> None:
    for heads, dim in PRESETS:
        q, weights, keys = draw(1, 16, heads, dim, 2 * COLUMNS)
        order = torch.randperm(16)
        mixed = index_scores(q[:, order], weights[:, order], keys)
        assert same_bits(mixed, index_scores(q, weights, keys)[:, order])


def test_place_of_a_key_does_not_matter() -> None:
    """An entry stays at its column in a sequence, yet its score must be its own."""
    q, weights, keys = draw(2, 4, 16, 32, 2 * COLUMNS)
    order = torch.randperm(2 * COLUMNS)
    assert same_bits(index_scores(q, weights, keys[:, order]), index_scores(q, weights, keys)[:, :, order])


def test_least_queries_of_a_block() -> None:
    """Enough that the product never has fewer than 8 rows, in whole tiles of 8."""
    for heads in range(1, 130):
        assert block_rows(heads) * heads % 8 == 0
        assert all(fewer * heads % 8 for fewer in range(1, block_rows(heads)))


def test_no_columns() -> None:
    assert index_scores(*draw(2, 4, 16, 32, 0)).shape == (2, 4, 0)
