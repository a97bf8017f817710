"""top_k against sorting (-score, index)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels import assert_rows_stand_alone
from weft.kernels import topk
from weft.kernels.topk import top_k

INF = float("inf")
# Few values, so that most rows hold ties; neighbours, so that a lost bit shows.
VALUES = [0.0, -0.0, 1.0, 1.0 + 2.0**-23, -1.0, -1.0 - 2.0**-23, 2.0**-149, -(2.0**-149), 3e38, -3e38, INF, -INF]


def expected(row: list[float], k: int) -> list[int]:
    order = sorted((-score, i) for i, score in enumerate(row) if score != -INF)
    best = sorted(i for _, i in order[:k])
    return best + [-1] * (k - len(best))


@given(st.lists(st.sampled_from(VALUES), min_size=1, max_size=40), st.integers(1, 45))
@example([-INF] * 5, 3)
@example([-0.0, 0.0, -0.0], 1)
@example([0.0, -0.0, 0.0], 2)
@example([-3.4028234663852886e38, -INF], 2)
@settings(max_examples=300)
def test_many_ties(row: list[float], k: int) -> None:
    """Both ways of finding them, whatever the width that decides between them."""
    scores = torch.tensor([row])
    for limit in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(topk, "_SORT_UP_TO", limit)
            assert top_k(scores, k).tolist() == [expected(row, k)]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70), st.integers(1, 80))
@settings(max_examples=150)
def test_any_floats(row: list[float], k: int) -> None:
    assert top_k(torch.tensor([row]), k).tolist() == [expected(row, k)]


@pytest.mark.parametrize("width", [1, 3, 33, 64, 128, 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("k", [1, 8, 512])
def test_wide_rows(width: int, k: int) -> None:
    scores = torch.randint(-20, 20, (7, width)).float()
    scores[torch.rand(7, width) < 0.2] = -INF
    scores[3] = -INF
    got = top_k(scores, k)
    assert got.shape == (7, k)
    assert got.dtype == torch.int64
    assert got.tolist() == [expected(row, k) for row in scores.tolist()]


def with_ties(rows: int, width: int) -> Tensor:
    """Scores as the indexer makes them: many exact zeros, some repeats."""
    scores = torch.randn(rows, width).relu_()
    scores[:, ::7] = scores[:, :1].clone()
    return scores


@pytest.mark.parametrize("width", [1, 3, 33, 128, 256, 384, 1024])
def test_padding_the_row_changes_nothing(width: int) -> None:
    """Across the width at which another algorithm takes over, too."""
    scores = with_ties(20, width)
    for k in (1, 8, 100):
        narrow = top_k(scores, k)
        for extra in (1, 31, 128, 256, 900):
            padded = torch.cat((scores, torch.full((20, extra), -INF)), 1)
            assert torch.equal(top_k(padded, k), narrow), (k, extra)


@pytest.mark.parametrize("width", [3, 128, 257, 1024])
def test_rows_stand_alone(width: int) -> None:
    assert_rows_stand_alone(lambda scores: top_k(scores, 8), with_ties(270, width))


def test_all_equal_takes_the_first() -> None:
    for width in (10, 300):
        assert top_k(torch.full((2, width), 0.25), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_nothing_to_choose_from() -> None:
    assert top_k(torch.empty(3, 0), 2).tolist() == [[-1, -1]] * 3
    assert top_k(torch.empty(0, 5), 2).shape == (0, 2)
    assert top_k(torch.full((1, 300), -INF), 2).tolist() == [[-1, -1]]


def test_scores_are_not_changed() -> None:
    for width in (5, 500):
        scores = torch.tensor([[-0.0, 1.0, -INF, 2.0, 0.0] * (width // 5)])
        kept = scores.clone()
        top_k(scores, 3)
        assert torch.equal(scores.view(torch.int32), kept.view(torch.int32))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError):
        top_k(torch.zeros(1, 3).double(), 1)
