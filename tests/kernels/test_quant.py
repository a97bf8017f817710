"""Rounding to FP8 and FP4 against all values of the formats, one number at a time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from support.kernels import assert_rows_stand_alone, assert_within, same_bits
from weft.kernels import quant
from weft.kernels.quant import hadamard, power_of_two_at_least, round_e2m1, simulate_fp4, simulate_fp8_

INF = torch.tensor(torch.inf)


def e4m3(code: int) -> float:
    """Of code 0..126: 4 exponent bits, biased by 7, and 3 of mantissa; 127 is NaN."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = [e4m3(code) for code in range(127)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(x: Tensor, grid: list[float]) -> Tensor:
    """With the sign of x; of two equally near values the one with the even code. float64 holds all distances."""
    distance = (torch.tensor(grid).double() - x.double().abs()[..., None]).abs()
    near = (distance == distance.amin(-1, keepdim=True)).int()
    even = 1 - torch.arange(len(grid)) % 2
    code = (near * (1 + even)).argmax(-1)  # of two neighbours just one is even
    return torch.copysign(torch.tensor(grid)[code], x)


def near_the_grid(grid: list[float]) -> Tensor:
    """Every value of the format, every midpoint, and their neighbours, of both signs."""
    points = torch.tensor(grid + [(a + b) / 2 for a, b in pairwise(grid)])
    around = torch.cat((points, torch.nextafter(points, INF), torch.nextafter(points, -INF)))
    around = around[(around >= 0) & (around <= grid[-1])]
    return torch.cat((around, -around))


def scale_of(largest: float, limit: float, least: float) -> float:
    """2^ceil(log2(max(largest, least) / limit)), by doubling; least is a float32, the quotient is not rounded."""
    ratio = Fraction(max(largest, float(torch.tensor(least)))) / Fraction(limit)
    power = Fraction(1)
    while power < ratio:
        power *= 2
    while power / 2 >= ratio:
        power /= 2
    return float(power)


def round_groups(x: Tensor, size: int, grid: list[float], least: float) -> Tensor:
    out = x.clone()
    for row in out:
        for group in row.split(size):
            scale = scale_of(float(group.abs().max()), grid[-1], least)
            group.copy_(nearest(group / scale, grid) * scale)
    return out


def test_round_e2m1() -> None:
    x = near_the_grid(E2M1)
    assert same_bits(round_e2m1(x), nearest(x, E2M1))


def test_round_e2m1_of_everything_between() -> None:
    x = torch.linspace(-7, 7, 14 * 512 + 1)
    assert same_bits(round_e2m1(x), nearest(x, E2M1))


def test_round_e2m1_clips() -> None:
    x = torch.tensor([6.1, 7.0, 1e30, torch.inf, -6.1, -torch.inf, -0.0, -0.2])
    assert same_bits(round_e2m1(x), torch.tensor([6.0, 6.0, 6.0, 6.0, -6.0, -6.0, -0.0, -0.0]))


@pytest.mark.parametrize("power", [-60, -3, 0, 5, 100])
def test_every_fp4_value_and_midpoint(power: int) -> None:
    """6 * 2^power in each group sets its scale to 2^power."""
    values = near_the_grid(E2M1)
    rows = torch.cat((values, torch.zeros(-len(values) % 31))).view(-1, 31)
    x = torch.cat((torch.full((len(rows), 1), 6.0), rows), 1) * 2.0**power
    assert same_bits(simulate_fp4(x), round_groups(x, 32, E2M1, 6 * 2.0**-126))


@pytest.mark.parametrize("power", [-10, -3, 0, 5, 100])
def test_every_fp8_value_and_midpoint(power: int) -> None:
    """448 * 2^power in each group sets its scale to 2^power."""
    values = near_the_grid(E4M3)
    rows = torch.cat((values, torch.zeros(-len(values) % 63))).view(-1, 63)
    x = torch.cat((torch.full((len(rows), 1), -448.0), rows), 1) * 2.0**power
    assert same_bits(simulate_fp8_(x.clone(), 64), round_groups(x, 64, E4M3, 1e-4))


def unlike_rows(rows: int, width: int) -> Tensor:
    """Random sizes, a row of zeros, one of tiny numbers, and a largest value just around each power of two."""
    x = torch.randn(rows, width) * 2.0 ** torch.randint(-20, 20, (rows, width))
    x[0] = 0
    x[1] *= 1e-30
    edge = torch.tensor(448.0) * 2.0 ** torch.arange(-3, 3)
    edge = torch.cat((edge, torch.nextafter(edge, INF), torch.nextafter(edge, -INF), edge / 448 * 6))
    for i, top in enumerate(edge):
        x[2 + i] = torch.randn(width).clamp(-3, 3) / 4 * top
        x[2 + i, i % width] = top
    for i, top in enumerate((3e-5, 9e-5, 1e-4, 1.1e-4, 2e-4, 9e-4), start=2 + len(edge)):
        x[i] = torch.rand(width) * top  # FP8 scales stop shrinking at 1e-4
        x[i, i % width] = top
    return x


@pytest.mark.parametrize(("width", "total"), [(64, 64), (48, 64), (448, 512), (1, 1), (33, 40), (65, 130)])
def test_fp8_of_random_rows(width: int, total: int) -> None:
    """A last group may be short; channels behind `width` stay as they are."""
    x = unlike_rows(40, total)
    exact = torch.cat((round_groups(x[:, :width], 64, E4M3, 1e-4), x[:, width:]), 1)
    assert simulate_fp8_(x, width) is x
    assert same_bits(x, exact)


@pytest.mark.parametrize("width", [1, 3, 16, 32, 64, 128])
def test_fp4_of_random_rows(width: int) -> None:
    x = unlike_rows(40, width)
    kept = x.clone()
    assert same_bits(simulate_fp4(x), round_groups(x, min(32, width), E2M1, 6 * 2.0**-126))
    assert same_bits(x, kept)


def test_fp4_keeps_leading_dimensions() -> None:
    x = torch.randn(5, 3, 64)
    assert same_bits(simulate_fp4(x), simulate_fp4(x.view(15, 64)).view(5, 3, 64))


def test_rounding_twice_changes_nothing() -> None:
    x = unlike_rows(40, 128)
    once = simulate_fp8_(x.clone(), 128)
    assert torch.equal(simulate_fp8_(once.clone(), 128), once)
    four = simulate_fp4(x)
    assert torch.equal(simulate_fp4(four), four)


def test_rows_stand_alone() -> None:
    for width in (16, 64, 128):
        assert_rows_stand_alone(simulate_fp4, unlike_rows(261, width))
    for width, total in ((48, 64), (448, 512)):
        assert_rows_stand_alone(lambda x, width=width: simulate_fp8_(x, width), unlike_rows(261, total))


def test_power_of_two_at_least() -> None:
    """Exact powers, one step below and one above, at every place of a long vector."""
    exponents = list(range(-125, 127))
    power = torch.tensor([2.0**e for e in exponents])
    for _ in range(3):
        order = torch.randperm(len(exponents))
        x = power[order]
        assert same_bits(power_of_two_at_least(x), x)
        assert same_bits(power_of_two_at_least(torch.nextafter(x, torch.zeros(()))), x)
        assert same_bits(power_of_two_at_least(torch.nextafter(x, INF)), 2 * x)
        assert same_bits(power_of_two_at_least(x * 1.5), 2 * x)
        assert same_bits(power_of_two_at_least(x[:1]), x[:1])


def test_power_of_two_of_every_scale() -> None:
    """From 2^-126 up to the largest a float32 can need: 2^127."""
    exponents = torch.arange(-126, 128)
    assert same_bits(quant.power_of_two(exponents), torch.tensor([2.0 ** int(e) for e in exponents]))


def recursive(size: int) -> list[list[int]]:
    """H(1) = 1, H(2n) = [[H, H], [H, -H]]."""
    if size == 1:
        return [[1]]
    half = recursive(size // 2)
    return [row + row for row in half] + [row + [-v for v in row] for row in half]


@pytest.mark.parametrize("size", [1, 2, 8, 32, 128])
def test_hadamard(size: int) -> None:
    matrix = hadamard(size)
    signs = torch.tensor(recursive(size)).double()
    assert matrix.dtype == torch.float32
    assert_within(matrix, signs * size**-0.5, 2.0**-24 * size**-0.5)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.sign().double(), signs)
    assert_within(matrix.double() @ matrix.double(), torch.eye(size).double(), 2.0**-22)
