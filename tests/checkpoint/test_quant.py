"""The formats against a decoder written from their definition, one code at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.runtime.checkpoint.quant import (
    dequantise_fp4,
    dequantise_fp8,
    quantise_fp4,
    quantise_fp8,
)

SIZES = [(1, 2), (5, 30), (127, 128), (128, 256), (129, 130), (257, 386), (300, 64)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return math.ldexp(sign * mantissa, -9)
    return math.ldexp(sign * (8 + mantissa), exponent - 10)


FINITE_E4M3 = [code for code in range(256) if code & 127 != 127]


def random_weight(rows: int, columns: int, spread: float, seed: int) -> Tensor:
    """Entries whose magnitudes differ by many powers of two, so that blocks get unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    return noise * torch.exp2(spread * torch.randn(rows, columns, generator=generator))


def scale_of(byte: int, *shape: int) -> Tensor:
    return torch.full(shape, byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("byte", [20, 117, 127, 200])
def test_every_fp8_code(byte: int, dtype: torch.dtype) -> None:
    codes = torch.tensor([FINITE_E4M3], dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = dequantise_fp8(codes, scale_of(byte, 1, 2), dtype)
    exact = torch.tensor([[e4m3(c) for c in FINITE_E4M3]], dtype=torch.float64) * 2.0 ** (byte - 127)
    assert got.dtype == dtype
    assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("byte", [20, 117, 127, 200])
def test_every_fp4_byte(byte: int, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    got = dequantise_fp4(packed.view(torch.int8), scale_of(byte, 1, 16), 512, dtype)
    values = E2M1 + [-v for v in E2M1]
    exact = [v for b in range(256) for v in (values[b & 15], values[b >> 4])]
    assert got.dtype == dtype
    assert torch.equal(got.double(), torch.tensor([exact], dtype=torch.float64) * 2.0 ** (byte - 127))


def test_blocks_take_their_own_scale() -> None:
    ones = torch.ones(257, 300).to(torch.float8_e4m3fn)
    bytes_ = torch.arange(120, 129, dtype=torch.uint8).view(3, 3)
    got = dequantise_fp8(ones, bytes_.view(torch.float8_e8m0fnu), torch.float32)
    row, column = torch.arange(257) // 128, torch.arange(300) // 128
    assert torch.equal(got, torch.exp2(bytes_.float() - 127)[row[:, None], column])


def test_float32_scales() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    got = dequantise_fp8(weight.to(torch.float8_e4m3fn), torch.tensor([[0.3]]), torch.float32)
    assert torch.equal(got, weight * 0.3)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_scale_is_the_smallest_that_fits(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns, 4.0, seed=rows)
    for largest, block, scale in (
        (448.0, (128, 128), quantise_fp8(weight)[1]),
        (6.0, (1, 32), quantise_fp4(weight)[1]),
    ):
        height, width = block
        assert scale.shape == (-(-rows // height), -(-columns // width))
        for i in range(min(scale.shape[0], 7)):
            for j in range(scale.shape[1]):
                part = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
                need = part.abs().max().double() / largest
                got = scale[i, j].double()
                assert got / 2 < need <= got


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_rounding_is_to_nearest_even(rows: int, columns: int, spread: float) -> None:
    weight = random_weight(rows, columns, spread, seed=columns)
    codes, scale = quantise_fp8(weight)
    grid = torch.tensor([e4m3(c) for c in range(127)], dtype=torch.float64)
    unit = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(codes.double(), nearest_even(weight.double() / unit.double(), grid))
    packed, scale = quantise_fp4(weight)
    unit = scale.float().repeat_interleave(32, 1)[:, :columns]
    exact = nearest_even(weight.double() / unit.double(), torch.tensor(E2M1).double())
    got = dequantise_fp4(packed, scale, columns, torch.float32)
    assert torch.equal(got.double(), exact * unit.double())


def nearest_even(x: Tensor, grid: Tensor) -> Tensor:
    """Nearest grid value; at a tie the one with the even index (its mantissa ends in 0)."""
    above = torch.searchsorted(grid, x.abs()).clamp(1, len(grid) - 1)
    below = above - 1
    to_above, to_below = (grid[above] - x.abs()).abs(), (grid[below] - x.abs()).abs()
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return grid[torch.where(up, above, below)] * torch.sign(x)


def test_midpoints() -> None:
    middles = [(a + b) / 2 for a, b in pairwise(E2M1)]
    weight = torch.tensor([[*middles, 6.0, *(-m for m in middles), -6.0]])
    packed, scale = quantise_fp4(weight)
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    got = dequantise_fp4(packed, scale, 16, torch.float32)
    assert torch.equal(got, torch.tensor([even + [-v for v in even]]))
    assert packed[0, 3].item() == 6 | 7 << 4  # columns 6 and 7: 4 in the low nibble, 6 in the high


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140).map(lambda n: 2 * n),
    spread=st.sampled_from([0.0, 2.0, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_quantised_values_are_fixed_points(rows: int, columns: int, spread: float, seed: int) -> None:
    weight = random_weight(rows, columns, spread, seed)
    once = dequantise_fp8(*quantise_fp8(weight), torch.float32)
    assert torch.equal(dequantise_fp8(*quantise_fp8(once), torch.float32), once)
    assert torch.equal(dequantise_fp8(*quantise_fp8(weight), torch.bfloat16).float(), once)
    once = dequantise_fp4(*quantise_fp4(weight), columns, torch.float32)
    assert torch.equal(dequantise_fp4(*quantise_fp4(once), columns, torch.float32), once)
    assert torch.equal(dequantise_fp4(*quantise_fp4(weight), columns, torch.bfloat16).float(), once)


@pytest.mark.parametrize("power", [-149, -136, -130, -127, -126, -100, -10, 0, 10, 100, 118])
def test_extremes(power: int) -> None:
    """Multiples of one power of two that the format has, from the smallest float32 to the largest."""
    allowed = 2.0**-129 if power < -120 else 0.0  # half a step at scale 2^-127, the smallest of E8M0

    def scaled(values: list[float]) -> Tensor:
        return (torch.tensor([values], dtype=torch.float64) * 2.0**power).float()

    weight = scaled([448.0, -416.0, 1.0, 0.0])
    got = dequantise_fp8(*quantise_fp8(weight), torch.float32)
    assert (got - weight).abs().max() <= allowed
    weight = scaled([6.0, -4.0, 0.5, 0.0])
    got = dequantise_fp4(*quantise_fp4(weight), 4, torch.float32)
    assert (got - weight).abs().max() <= allowed


@pytest.mark.parametrize("value", [2.0**126, 448.0, 416.0, 6.0, 1.0, 2.0**-100])
@pytest.mark.parametrize("direction", [0.0, torch.inf])
def test_neighbours_of_round_values(value: float, direction: float) -> None:
    """One step above 448 the scale doubles; the error stays within half a step of the format."""
    weight = torch.nextafter(torch.tensor([[value, 0.0]]), torch.tensor(direction))
    largest = weight.max().double()
    got = dequantise_fp8(*quantise_fp8(weight), torch.float32)
    assert (got.double() - weight).abs().max() <= largest / 16
    got = dequantise_fp4(*quantise_fp4(weight), 2, torch.float32)
    assert (got.double() - weight).abs().max() <= largest / 4


def test_zeros_have_scale_one() -> None:
    for codes, scale in (quantise_fp8(torch.zeros(3, 4)), quantise_fp4(torch.zeros(3, 4))):
        assert torch.equal(scale.float(), torch.ones(scale.shape))
        assert not codes.view(torch.uint8).any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_only_finite_weights(value: float) -> None:
    for quantise in (quantise_fp8, quantise_fp4):
        with pytest.raises(AssertionError, match="finite"):
            quantise(torch.tensor([[1.0, value]]))
