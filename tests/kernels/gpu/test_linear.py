"""Linears on the device: against float64 within float32's error, with the same bits for a row in every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernels import U16, U32, assert_within, gamma, same_bits
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.linear import fp8_linear, least_bytes, linear, pack_fp8, quantise_rows
from weft.kernels.gpu.weights import GROUP, FloatWeight, Fp8Weight
from weft.kernels.layouts import RowLayout
from weft.kernels.reference import linear as reference
from weft.kernels.reference.heads import rms_norm
from weft.kernels.reference.linear import FLASH, Shape, example, random_float, random_fp8, values, weight_values
from weft.kernels.reference.rows import error_bound

pytest.importorskip("triton")
from weft.kernels.triton import linear as launches

each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])
each_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
# Tails of rows and of K, several splits of K, groups.
SHAPES = [Shape(70, 640), Shape(64, 48), Shape(3, 300), Shape(96, 130, groups=2)]


def rounding(dtype: torch.dtype) -> float:
    return U16 if dtype == torch.bfloat16 else U32


def made(shape: Shape, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments; x is a slice of wider rows, NaN elsewhere; rows differ in size."""
    wide = torch.full((tokens, shape.groups * shape.columns + 64), torch.nan, device=device, dtype=dtype)
    x = wide[:, 32 : 32 + shape.groups * shape.columns]
    x.copy_(torch.randn(x.shape, device=device) * torch.rand(tokens, 1, device=device) * 4)
    norm = (torch.rand(shape.columns, device=device) + 0.5, 1e-6) if shape.norm else None
    return {"x": x.unflatten(1, (shape.groups, -1)), "norm": norm, "groups": shape.groups}


def fp8_exact(codes: Tensor, scales: Tensor, weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    """Of quantised x [T, G, K]: [T, N] float64, and how far float32 may be from it.

    128 products of codes, exact in float32, are summed: in float32, or by Hopper's matrix instructions, which take
    32 at once and cut each, and the sum so far, 13 bits below the largest. Then the scaled sums are added.
    """
    exact, bound, sizes = 0.0, 0.0, 0.0
    groups = codes.shape[1]
    chunks = -(-codes.shape[2] // GROUP)
    for chunk in range(chunks):
        part = slice(chunk * GROUP, (chunk + 1) * GROUP)
        w = weight.codes[:, part].float().double().unflatten(0, (groups, -1))
        products = codes[:, :, None, part].float().double() * w  # [T, G, N / G, 128]
        size = products.abs().sum(-1)
        error = gamma(GROUP) * size
        if codes.is_cuda:
            top = products.abs().amax(-1) + products.cumsum(-1).abs().amax(-1)
            error = 132 * 2.0**-13 * top
        ones = torch.ones_like(scales, dtype=torch.float64)
        x_scale = torch.ldexp(ones, scales.int() - 127)[:, :, None, chunk]
        w_scale = torch.ldexp(ones.new_ones(weight.shape[0]), weight.scales[chunk].int() - 127)
        scale = (x_scale * w_scale.unflatten(0, (groups, -1))).expand_as(size)
        exact, bound, sizes = exact + scale * products.sum(-1), bound + scale * error, sizes + scale * size
    return exact.flatten(1), (bound + gamma(2 * chunks) * (sizes + bound)).flatten(1)


def check_fp8(given: dict[str, Any], weight: Fp8Weight, dtype: torch.dtype, **how: Any) -> None:
    x = given["x"].unflatten(1, (given["groups"], -1)) if given["x"].dim() == 2 else given["x"]
    got = fp8_linear(weight=weight, **given, dtype=dtype, **how)
    assert got.dtype == dtype and not weight.locks.any()
    quantised = [quantise_rows(x[:, g], given["norm"], **how) for g in range(x.shape[1])]
    codes, scales = (torch.stack(parts, 1) for parts in zip(*quantised, strict=True))
    exact, bound = fp8_exact(codes, scales, weight)
    assert_within(got.double(), exact, bound + rounding(dtype) * (exact.abs() + bound))


@each_implementation
@each_type
@pytest.mark.parametrize("tokens", [1, 66])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8(shape: Shape, tokens: int, dtype: torch.dtype, implementation: str, device: str) -> None:
    weight = random_fp8(shape.rows, shape.columns, device)
    given = made(shape, tokens, device, dtype)
    check_fp8(given, weight, dtype, implementation=implementation)
    check_fp8(made(shape._replace(norm=True), tokens, device, dtype), weight, dtype, implementation=implementation)


@each_implementation
@each_type
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("columns", [48, 128, 300])
def test_quantised_rows(columns: int, norm: bool, dtype: torch.dtype, implementation: str, device: str) -> None:
    x = made(Shape(1, columns), 19, device, dtype)["x"][:, 0]
    x[2:4] = 0.0
    x[4, 0] = 448.0  # a scale's exact border
    weight = (torch.rand(columns, device=device) + 0.5, 1e-6) if norm else None
    codes, scales = quantise_rows(x, weight, implementation=implementation)
    exact, error = x.double(), 0.0
    if norm:  # a sum of squares, a root, a quotient, two products; then rounded to x's type
        exact = rms_norm(exact, *weight)
        error = exact.abs() * (40 * U32 + rounding(dtype))
    else:
        want, want_scales = reference.quantise_rows(x, None)
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scales, want_scales)
    allowed = error_bound(exact.abs() + error, RowLayout(1, columns, 0, GROUP)) + error
    assert_within(values(codes, scales), exact, allowed)


@each_implementation
@each_type
@pytest.mark.parametrize("x_type", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_floats(shape: Shape, x_type: torch.dtype, dtype: torch.dtype, implementation: str, device: str) -> None:
    weight = random_float(shape.rows, shape.columns, device, dtype)
    for norm in (False, True):
        given = made(shape._replace(norm=norm), 9, device, x_type)
        got = linear(weight=weight, **given, dtype=torch.float32, implementation=implementation)
        x = given["x"].double()
        x = rms_norm(x, *given["norm"]) if norm else given["x"].to(dtype).double()
        exact = reference.product(x, weight.weight.double())
        sizes = reference.product(x.abs(), weight.weight.double().abs())
        # Matrix instructions cut each of 16 products, and their sum so far, behind the 24 bits of the largest.
        unit = gamma(2 * shape.columns, 2 * U32) if device == "cuda" else gamma(shape.columns + 8)
        if norm:
            unit += 40 * U32 + rounding(x_type) + rounding(dtype)
        assert_within(got.double(), exact, unit * sizes + U32 * exact.abs())
        assert not weight.locks.any()


def batches(tokens: int, device: str) -> list[Tensor]:
    """Rows alone, in tiles of every width, and in another order; float32 has one width."""
    order = torch.randperm(tokens, device=device)
    return [order[:1], order[-1:], order[3:20], order[:40], order]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [Shape(66, 520), Shape(40, 200, groups=2)])
def test_a_row_has_the_same_bits_in_every_batch(shape: Shape, kind: Any, norm: bool, device: str) -> None:
    tokens = 20 if kind == torch.float32 else 72
    given = made(shape._replace(norm=norm), tokens, device, dtype=torch.float32)
    if kind == "fp8":
        run, weight = fp8_linear, random_fp8(shape.rows, shape.columns, device)
    else:
        run, weight = linear, random_float(shape.rows, shape.columns, device, kind)
    given["x"] = given["x"].to(torch.bfloat16) if kind == "fp8" else given["x"]
    together = run(weight=weight, **given, dtype=torch.float32)
    for rows in batches(tokens, device):
        part = run(weight=weight, **{**given, "x": given["x"][rows]}, dtype=torch.float32)
        assert same_bits(part, together[rows])


@pytest.mark.parametrize("kind", ["fp8", torch.bfloat16])
def test_splits_in_turn_have_the_bits_of_splits_side_by_side(
    kind: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(70, 1100)
    given = made(shape, 70, device)
    weight: Any = random_float(70, 1100, device) if kind != "fp8" else random_fp8(70, 1100, device)
    run: Any = linear if kind != "fp8" else fp8_linear
    side_by_side = run(weight=weight, **given, dtype=torch.float32)
    assert launches.split(70, 1100, 1) == (3, 3)
    monkeypatch.setattr(launches, "_FEW_TILES", 0)
    assert same_bits(run(weight=weight, **given, dtype=torch.float32), side_by_side)


def test_extremes(device: str) -> None:
    """Nothing, less than a scale's least, its exact borders, and far beyond e4m3's range in either direction."""
    weight = random_fp8(70, 300, device)
    given = made(Shape(70, 300), 7, device, torch.float32)
    x = given["x"]
    x[0] = 0.0
    x[1] *= 1e-7
    x[2] *= 1e20
    x[3, 0, :128], x[3, 0, 128:] = 448.0, 448.0 * (1 + 2**-20)
    x[4, 0, 1:] = 0.0
    check_fp8(given, weight, torch.float32)
    alone = fp8_linear(x[5:6], weight)
    x[6, 0, 5] = torch.inf
    assert same_bits(fp8_linear(x, weight)[5:6], alone)


def test_what_lies_behind_a_weight_is_not_read(device: str) -> None:
    rows, columns = 70, 200
    codes = torch.full((rows * columns + 9000,), 0x7F, dtype=torch.uint8, device=device)
    scales = torch.full((2 * rows + 300,), 255, dtype=torch.uint8, device=device)
    plain = random_fp8(rows, columns, device)
    codes[: rows * columns] = plain.codes.view(torch.uint8).flatten()
    scales[: 2 * rows] = plain.scales.flatten()
    inside = codes[: rows * columns].view(torch.float8_e4m3fn).view(rows, columns)
    weight = Fp8Weight(inside, scales[: 2 * rows].view(2, rows), plain.locks)
    given = made(Shape(rows, columns), 3, device)
    assert same_bits(fp8_linear(weight=weight, **given), fp8_linear(weight=plain, **given))


def test_no_tokens(device: str) -> None:
    weight = random_fp8(70, 200, device)
    assert fp8_linear(torch.empty(0, 200, device=device), weight).shape == (0, 70)
    assert linear(torch.empty(0, 200, device=device), random_float(70, 200, device)).shape == (0, 70)
    codes, scales = quantise_rows(torch.empty(0, 200, device=device))
    assert codes.shape == (0, 200) and scales.shape == (0, 2)


def test_packed_weights_keep_their_values(device: str) -> None:
    parts, exact = [], []
    for rows in (130, 64, 256):
        codes = torch.randn(rows, 300, device=device).to(torch.float8_e4m3fn)
        scale = torch.randint(110, 130, (-(-rows // 128), 3), dtype=torch.uint8, device=device)
        parts.append((codes, scale.view(torch.float8_e8m0fnu)))
        power = torch.ldexp(torch.ones(scale.shape, device=device, dtype=torch.float64), scale.int() - 127)
        grid = power.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :300]
        exact.append(codes.float().double() * grid)
    weight = pack_fp8(parts)
    assert weight.shape == (450, 300) and weight.scales.shape == (3, 450) and weight.scales.is_contiguous()
    assert torch.equal(weight_values(weight), torch.cat(exact))
    x = made(Shape(450, 300), 4, device)["x"][:, 0]
    apart = torch.cat([fp8_linear(x, pack_fp8([part])) for part in parts], 1)
    assert same_bits(fp8_linear(x, weight), apart)
    assert torch.equal(FloatWeight.of(exact[0], exact[1]).weight, torch.cat(exact[:2]))


def test_at_the_models_sizes(device: str) -> None:
    given = example(3, device, FLASH["wq_a|wkv"]._replace(rows=128))
    weight = given.pop("weight")
    given.pop("dtype")
    check_fp8(given, weight, torch.bfloat16)


@pytest.mark.parametrize("name", FLASH)
def test_programs_are_enough_for_every_multiprocessor(name: str) -> None:
    shape = FLASH[name]
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    for tokens in (1, 16, 64):
        plan = launches.config(shape.rows, shape.columns, shape.groups, tokens, dtype)
        token_tiles, row_tiles = plan.tiles(tokens, shape.rows, shape.groups)
        assert token_tiles == 1 and row_tiles * plan.splits >= 128 and plan.parallel == (plan.splits > 1)
        assert (plan.per, plan.splits) == launches.split(shape.rows, shape.columns, shape.groups)


@pytest.mark.parametrize(
    "shape",
    [
        FLASH["wq_a|wkv"]._replace(rows=128),
        FLASH["wq_b"]._replace(rows=256),
        FLASH["wo_a"]._replace(rows=128, groups=2),
        FLASH["compressor c128"]._replace(rows=256),
    ],
)
def test_bytes_moved(shape: Shape, device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example(2, device, shape)
    with traffic() as moved:
        out = (fp8_linear if shape.fp8 else linear)(**given, implementation="triton")
    least = least_bytes(2, given["weight"], shape.groups, 2, out.element_size())
    assert moved.total <= 1.3 * least
