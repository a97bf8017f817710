"""Attention's output rotated back, and that quantised in groups for an FP8 linear.

A token's heads are tiles of [rows, WIDTH] channels: a row is a head, or as many small heads as make one group of
the quantised form. Nothing is summed, so a program may take any number of rows.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.triton.common import e4m3_bits, quantise, rotate_back

_CHANNELS = 2048
_WARPS = 4


@triton.jit
def _rotated(
    o,
    cos_sin,
    token,
    row,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Rows [R, 1] of a token's TOTAL, rotated back: float32 [R, COLS]; where in its channels; which are any."""
    column = tl.arange(0, COLS)[None, :]
    mask = (row < TOTAL) & (column < WIDTH)
    at = row * WIDTH + column
    x = tl.load(o + token * (TOTAL * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
    even = 2 * tl.arange(0, COLS // 2)[None, :]
    turns = (even < WIDTH) & (even % D >= D - ROPE)
    pair = cos_sin + token * ROPE + (even % D - (D - ROPE)) // 2
    cos = tl.load(pair, mask=turns, other=1.0)
    sin = tl.load(pair + ROPE // 2, mask=turns, other=0.0)
    return rotate_back(x, cos, sin), at, mask


@triton.jit
def _inverse_rope(
    o,
    cos_sin,
    out,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x, at, mask = _rotated(o, cos_sin, token, row, TOTAL, WIDTH, COLS, D, ROPE)
    tl.store(out + token * (TOTAL * WIDTH) + at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_rope_quant(
    o,
    cos_sin,
    codes,
    scales,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x, at, mask = _rotated(o, cos_sin, token, row, TOTAL, WIDTH, COLS, D, ROPE)
    scaled, byte = quantise(x, COLS // GROUP, "e4m3", "e8m0", 1e-4)
    tl.store(codes + token * (TOTAL * WIDTH) + at, e4m3_bits(scaled), mask=mask)
    GROUPS: tl.constexpr = WIDTH // GROUP
    group = row * GROUPS + tl.arange(0, COLS // GROUP)[None, :]
    power = (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + token * (TOTAL * GROUPS) + group, power, mask=row < TOTAL)


def inverse_rope(o: Tensor, cos_sin: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.output.inverse_rope`."""
    tokens, heads, dim = o.shape
    sizes = _sizes(heads, dim, cos_sin.shape[1], dim)
    grid = (tokens, triton.cdiv(sizes["TOTAL"], sizes["ROWS"]))
    _inverse_rope[grid](o, cos_sin, out, **sizes, num_warps=_WARPS)


def inverse_rope_quant(o: Tensor, cos_sin: Tensor, group: int, codes: Tensor, scales: Tensor) -> None:
    """See `weft.kernels.gpu.output.inverse_rope_quant`."""
    tokens, heads, dim = o.shape
    sizes = _sizes(heads, dim, cos_sin.shape[1], max(dim, group))
    grid = (tokens, triton.cdiv(sizes["TOTAL"], sizes["ROWS"]))
    _inverse_rope_quant[grid](o, cos_sin, codes.view(torch.uint8), scales, **sizes, GROUP=group, num_warps=_WARPS)


def _sizes(heads: int, dim: int, rope: int, width: int) -> dict[str, int]:
    """Rows of `width` channels, whole heads, and how many of them a program takes."""
    total, columns = heads * dim // width, triton.next_power_of_2(width)
    rows = min(max(1, _CHANNELS // columns), triton.next_power_of_2(total))
    return {"TOTAL": total, "WIDTH": width, "COLS": columns, "D": dim, "ROPE": rope, "ROWS": rows}


def aot() -> tuple[AotCase, ...]:
    """V4-Flash and V4-Pro, bfloat16."""
    cases = []
    for model, heads in (("flash", 64), ("pro", 128)):
        sizes: dict[str, int] = _sizes(heads, 512, 64, 512)
        plain = {"o": "*bf16", "cos_sin": "*fp32", "out": "*bf16"}
        quant = {"o": "*bf16", "cos_sin": "*fp32", "codes": "*u8", "scales": "*fp32"}
        wide = (r"ld\.global\.v4", r"st\.global\.v4")
        packed = (r"ld\.global\.v4", r"st\.global\.v[24]", r"cvt\.rn\.satfinite\.e4m3x2")
        for name, kernel, signature, constants, expect in (
            ("inverse_rope", _inverse_rope, plain, sizes, wide),
            ("inverse_rope_quant", _inverse_rope_quant, quant, sizes | {"GROUP": 128}, packed),
        ):
            full = signature | dict.fromkeys(constants, "constexpr")
            expected = {"sm90": expect, "sm100": expect}
            cases.append(AotCase(f"{name}_{model}", kernel, full, constants, warps=_WARPS, expect=expected))
    return tuple(cases)
