"""Attention's output rotated back, and quantised: against float64, to the formats' own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.kernels import U32, assert_within, same_bits
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.output import inverse_rope, inverse_rope_quant, least_bytes
from weft.kernels.layouts import RowLayout
from weft.kernels.reference.heads import angles, rotate
from weft.kernels.reference.output import example
from weft.kernels.reference.rows import error_bound

each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])
SHAPES = [(1, 1, 128, 16), (3, 4, 64, 16), (5, 6, 64, 64), (2, 3, 128, 2), (2, 64, 512, 64), (1, 128, 512, 64)]


def inputs(tokens: int, heads: int, dim: int, rope: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    o = torch.randn(tokens, heads, dim, device=device) * torch.rand(tokens, heads, 1, device=device) * 9
    return o.to(dtype), angles(torch.randint(0, 100_000, (tokens,), device=device), rope)


def exact_of(o: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """float64, and the bound of float32: a channel has two products and a sum, 3 roundings of at most the pair."""
    exact = rotate(o.double(), cos_sin, inverse=True)
    pairs = o.double().abs().unflatten(-1, (-1, 2)).sum(-1)
    return exact, 3 * U32 * pairs.repeat_interleave(2, -1)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 80, 8)])
def test_inverse_rope(shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str) -> None:
    o, cos_sin = inputs(*shape, device, dtype)
    kept = o.clone()
    got = inverse_rope(o, cos_sin, implementation=implementation)
    exact, bound = exact_of(o, cos_sin)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else U32
    assert got.dtype == dtype
    assert_within(got.double(), exact, bound + rounding * (exact.abs() + bound))
    assert same_bits(o, kept)
    plain = o.shape[2] - cos_sin.shape[1]
    assert same_bits(got[..., :plain].contiguous(), o[..., :plain].contiguous())


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised(shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str) -> None:
    o, cos_sin = inputs(*shape, device, dtype)
    if shape[0] > 1:
        o[0] = 0.0
        o[1, 0, : shape[2] // 2] = 448.0  # a scale's exact border
    check_quantised(o, cos_sin, 128, implementation)


def check_quantised(o: Tensor, cos_sin: Tensor, group: int, implementation: str) -> None:
    tokens, heads, dim = o.shape
    codes, scales = inverse_rope_quant(o, cos_sin, group, implementation=implementation)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (tokens, heads * dim)
    assert scales.dtype == torch.float32 and scales.shape == (tokens, heads * dim // group)
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all()  # powers of two
    exact, bound = (x.flatten(1) for x in exact_of(o, cos_sin))
    allowed = error_bound(exact.abs() + bound, RowLayout(1, heads * dim, 0, group)) + bound
    assert_within(codes.double() * scales.double().repeat_interleave(group, 1), exact, allowed)


@pytest.mark.parametrize("group", [32, 64, 256])
def test_other_groups(group: int, device: str) -> None:
    check_quantised(*inputs(3, 4, 64, 16, device, torch.bfloat16), group, "triton")


def test_extremes(device: str) -> None:
    o, cos_sin = inputs(6, 4, 64, 16, device, torch.float32)
    for row, size in enumerate((1e30, 1e-30, 1e-7, 1e4, 0.0)):
        o[row] *= size
    check_quantised(o, cos_sin, 128, "triton")


def test_no_tokens(device: str) -> None:
    o, cos_sin = inputs(0, 4, 64, 16, device, torch.bfloat16)
    assert inverse_rope(o, cos_sin).shape == (0, 4, 64)
    codes, scales = inverse_rope_quant(o, cos_sin)
    assert codes.shape == (0, 256) and scales.shape == (0, 2)


def test_a_row_has_the_same_bits_in_every_batch(device: str) -> None:
    given = example(5, device, heads=6)
    o, cos_sin = given["o"], given["cos_sin"]
    out, (codes, scales) = inverse_rope(o, cos_sin), inverse_rope_quant(o, cos_sin)
    for rows in (torch.randperm(5, device=device), torch.tensor([3], device=device)):
        part = o[rows], cos_sin[rows]
        assert same_bits(inverse_rope(*part), out[rows])
        again, again_scales = inverse_rope_quant(*part)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8)[rows])
        assert same_bits(again_scales, scales[rows])


def test_bytes_moved(device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example(2, device)
    with traffic() as moved:
        inverse_rope(**given, implementation="triton")
    assert moved.total <= 1.3 * least_bytes(2, 64, 512, 64, 2, None)
    with traffic() as moved:
        inverse_rope_quant(**given, implementation="triton")
    assert moved.total <= 1.3 * least_bytes(2, 64, 512, 64, 2, 128)
