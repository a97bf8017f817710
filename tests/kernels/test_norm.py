"""RMS norm against float64, and rows alone against rows in a batch."""

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
    in_wider_rows,
    on_tensors,
    same_bits,
    threads,
)
from weft.kernels import norm

inverse_rms, rms_norm = on_tensors(norm.inverse_rms), on_tensors(norm.rms_norm)

WIDTHS = [1, 3, 33, 48, 64, 128, 512, 4096]
EPS = 1e-6


def exact_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    out = []
    for row in x.double().tolist():
        factor = 1 / math.sqrt(math.fsum(v * v for v in row) / len(row) + EPS)
        out.append([v * factor for v in row])
    normed = torch.tensor(out, dtype=torch.float64).view(x.shape)
    return normed if weight is None else normed * weight.double()


def relative_bound(width: int) -> float:
    """The sum of squares is off by (width + 4) u at most, its root by half; the root and two products add 6 u."""
    return gamma(width + 4) / 2 + 6 * U32


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("weighted", [True, False])
def test_close_to_float64(width: int, weighted: bool) -> None:
    x = torch.randn(9, width) * 10.0 ** torch.randint(-6, 7, (9, 1))
    weight = torch.randn(width) if weighted else None
    exact = exact_norm(x, weight)
    got = rms_norm(x, weight, EPS)
    assert_within(got, exact, relative_bound(width) * exact.abs())


def test_zeros_give_zeros() -> None:
    assert same_bits(rms_norm(torch.zeros(2, 33), torch.ones(33), EPS), torch.zeros(2, 33))
    assert float(inverse_rms(torch.zeros(1, 5), EPS)) == pytest.approx(EPS**-0.5, rel=1e-6)


def test_large_and_tiny_values() -> None:
    """Squares must stay inside float32: up to 2^63 and down to where eps takes over."""
    for scale in (2.0**60, 2.0**-60):
        x = torch.randn(4, 128) * scale
        exact = exact_norm(x, None)
        assert_within(rms_norm(x, None, EPS), exact, relative_bound(128) * exact.abs() + 2.0**-126)


def test_heads_are_normalised_one_by_one() -> None:
    q = torch.randn(7, 5, 33)
    factors = inverse_rms(q, EPS)
    assert factors.shape == (7, 5, 1)
    for t in range(7):
        for h in range(5):
            assert same_bits(factors[t, h], inverse_rms(q[t, h].clone(), EPS))


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_stand_alone(width: int) -> None:
    weight = torch.randn(width)
    assert_rows_stand_alone(lambda x: rms_norm(x, weight, EPS), torch.randn(ROWS, width))


@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 33), (4, 64), (3, 5)])
def test_rows_of_heads_stand_alone(heads: int, width: int) -> None:
    assert_rows_stand_alone(lambda x: inverse_rms(x, EPS), torch.randn(ROWS, heads, width))


def test_a_slice_of_columns_has_the_same_bits() -> None:
    """q and kv come out of one product and are normalised as slices of it."""
    x = torch.randn(13, 48)
    for before, behind in ((0, 64), (3, 1), (64, 0)):
        view = in_wider_rows(x, before, behind)
        assert same_bits(rms_norm(view, None, EPS), rms_norm(x, None, EPS))
        assert same_bits(inverse_rms(view, EPS), inverse_rms(x, EPS))


def test_two_threads() -> None:
    with threads(2):
        for width in (33, 512, 4096):
            x = torch.randn(70, width)
            assert differing_windows(lambda x: rms_norm(x, None, EPS), x, offsets=(0, 5)) == []


def test_input_is_not_changed_and_may_be_empty() -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    rms_norm(x, torch.ones(4), EPS)
    assert same_bits(x, kept)
    assert rms_norm(torch.empty(0, 4), torch.ones(4), EPS).shape == (0, 4)
    assert inverse_rms(torch.empty(0, 2, 4), EPS).shape == (0, 2, 1)
