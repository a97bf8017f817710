"""Sums whose order is fixed: compared bit by bit with the same order written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.kernels import ROWS, assert_rows_stand_alone, assert_within, gamma, on_tensors, same_bits
from weft.kernels import reduce

halving_sum, left_fold = on_tensors(reduce.halving_sum), on_tensors(reduce.left_fold)


def halved(terms: list[np.float32]) -> np.float32:
    """First half plus second half, element by element, until one is left."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


@pytest.mark.parametrize("terms", [1, 2, 4, 8, 128])
@pytest.mark.parametrize("width", [1, 3, 33])
def test_halving_order(terms: int, width: int) -> None:
    x = torch.randn(5, terms, width) * 10.0 ** torch.randint(-4, 5, (5, terms, 1))
    columns = x.numpy().transpose(0, 2, 1).reshape(-1, terms)
    expected = torch.tensor([halved(list(column)) for column in columns]).view(5, width)
    assert same_bits(halving_sum(x), expected)


@pytest.mark.parametrize("terms", [1, 2, 3, 6, 33])
@pytest.mark.parametrize("width", [1, 3, 33])
def test_left_to_right(terms: int, width: int) -> None:
    x = torch.randn(5, terms, width) * 10.0 ** torch.randint(-4, 5, (5, terms, 1))
    expected = torch.empty(5, width)
    for t in range(5):
        for c in range(width):
            total = np.float32(x[t, 0, c])
            for value in x[t, 1:, c].numpy():
                total = total + value
            expected[t, c] = float(total)
    assert same_bits(left_fold(x), expected)


def test_close_to_float64() -> None:
    x = torch.randn(7, 64, 9)
    bound = gamma(64) * x.double().abs().sum(1)
    assert_within(halving_sum(x), x.double().sum(1), bound)
    assert_within(left_fold(x), x.double().sum(1), bound)


@pytest.mark.parametrize("width", [1, 3, 33, 64])
def test_rows_stand_alone(width: int) -> None:
    x = torch.randn(ROWS, 8, width)
    assert_rows_stand_alone(halving_sum, x)
    assert_rows_stand_alone(left_fold, x)


def test_halving_needs_a_power_of_two() -> None:
    for terms in (3, 6, 12):
        with pytest.raises(AssertionError):
            halving_sum(torch.zeros(1, terms, 2))


def test_input_is_not_changed_and_may_be_empty() -> None:
    x = torch.randn(3, 4, 5)
    kept = x.clone()
    halving_sum(x)
    left_fold(x)
    assert same_bits(x, kept)
    assert halving_sum(torch.empty(0, 4, 5)).shape == (0, 5)
    assert left_fold(torch.empty(0, 4, 5)).shape == (0, 5)
