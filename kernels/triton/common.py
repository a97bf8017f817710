"""Device functions shared by kernels: norms, rotations, Hadamard, quantisation of rows and their store.

Tiles are [rows, columns] float32 with power-of-two sides; columns beyond a row's own hold zeros. Every function
treats rows apart, and sums in an order that the tile's shape and the number of warps fix: a kernel that is always
launched with the same ones gives a row the same bits wherever it stands.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from weft.kernels.layouts import RowLayout


def layout_constants(layout: RowLayout, prefix: str = "") -> dict[str, Any]:
    """The constants that `store_rows` wants, by the names that kernels give them behind a prefix."""
    constants = {
        "PAGE": layout.page,
        "CODED": layout.coded,
        "PLAIN": layout.plain,
        "GROUP": layout.group,
        "CODES": layout.codes,
        "SCALES": layout.scales,
        "SCALE_BYTES": layout.scale_bytes,
        "PAGE_BYTES": layout.page_bytes,
        "LEAST": layout.least,
    }
    return {prefix + name: value for name, value in constants.items()}


@triton.jit
def rms_scale(x, eps, DIM: tl.constexpr):
    """x [R, C], zeros from DIM on -> [R, 1] 1 / sqrt(mean(x^2) + eps), root and quotient rounded to nearest."""
    square = tl.sum(x * x, 1) * (1.0 / DIM) + eps
    return tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.sqrt_rn(square))[:, None]


@triton.jit
def load_rotation(cos_sin, rows, mask, DIM: tl.constexpr, ROPE: tl.constexpr, COLS: tl.constexpr):
    """cos_sin [*, ROPE] at rows [R] -> cos, sin [R, COLS / 2] of every pair: 1 and 0 of those that do not turn."""
    pair = tl.arange(0, COLS // 2) - (DIM - ROPE) // 2
    at = cos_sin + rows[:, None] * ROPE + pair[None, :]
    turns = mask[:, None] & ((pair >= 0) & (pair < ROPE // 2))[None, :]
    return tl.load(at, mask=turns, other=1.0), tl.load(at + ROPE // 2, mask=turns, other=0.0)


@triton.jit
def rotate(x, cos, sin):
    """Turn the pairs (2i, 2i+1) of x [R, C] by cos, sin [R or 1, C / 2]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def rotate_back(x, cos, sin):
    """The inverse of `rotate`. Which products are contracted is said, not left to each kernel's compilation: what
    is rotated in two kernels has the same bits."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    cos, sin = tl.broadcast_to(cos, even.shape), tl.broadcast_to(sin, even.shape)
    first = tl.fma(even, cos, odd * sin)
    second = tl.fma(odd, cos, -(even * sin))
    return tl.reshape(tl.join(first, second), x.shape)


@triton.jit
def hadamard(x):
    """Rows of x [R, C] times Sylvester's matrix over sqrt(C); C is 1024 at most."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    second = tl.arange(0, 2)[None, :, None] == 1
    for step in tl.static_range(10):
        if (2 << step) <= C:
            pairs = tl.reshape(x, [R * C // (2 << step), 2, 1 << step])
            total = tl.sum(pairs, 1)
            rest = tl.sum(tl.where(second, -pairs, pairs), 1)
            x = tl.reshape(tl.where(second, rest[:, None, :], total[:, None, :]), [R, C])
    return x * (C**-0.5)


@triton.jit
def power_of_two(exponent):
    """2^exponent, exactly, for int32 in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(top, CODES: tl.constexpr):
    """ceil(log2(top / largest code)) of positive normal float32, exactly: 448 is 1.75 * 2^8, 6 is 1.5 * 2^2."""
    bits = top.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = bits & 0x7FFFFF
    if CODES == "e4m3":
        return exponent - 8 + (mantissa > 0x600000).to(tl.int32)
    else:
        return exponent - 2 + (mantissa > 0x400000).to(tl.int32)


@triton.jit
def e4m3_bits(x):
    """Nearest e4m3 codes, saturating."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def e2m1_codes(x):
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign, int32; at a middle the even code, beyond 6 the largest."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32)
    code += (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_bytes(x):
    """x [R, C] -> [R, C / 2] uint8, the even column in the low nibble."""
    low, high = tl.split(tl.reshape(e2m1_codes(x), [x.shape[0], x.shape[1] // 2, 2]))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def quantise(x, GROUPS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, LEAST: tl.constexpr):
    """x [R, C] in GROUPS groups of columns -> x over its group's scale [R, C], and the scale [R, GROUPS]: the byte
    of an e8m0 or e4m3 scale, or float32."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    grouped = tl.reshape(x, [R, GROUPS, C // GROUPS])
    top = tl.maximum(tl.max(tl.abs(grouped), 2), LEAST)
    if SCALES == "e8m0":
        exponent = scale_exponent(top, CODES)
        return tl.reshape(grouped * power_of_two(-exponent)[:, :, None], [R, C]), (exponent + 127).to(tl.uint8)
    else:
        LARGEST: tl.constexpr = 448.0 if CODES == "e4m3" else 6.0
        scale = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
        stored = scale
        if SCALES == "e4m3":
            code = tl.maximum(scale, 0.001953125).to(tl.float8e4nv)
            scale = code.to(tl.float32)
            stored = code.to(tl.uint8, bitcast=True)
        divisor = tl.broadcast_to(scale[:, :, None], [R, GROUPS, C // GROUPS])
        return tl.reshape(tl.div_rn(grouped, divisor), [R, C]), stored


@triton.jit
def store_rows(
    x,
    rows,
    pool,
    PAGE: tl.constexpr,
    CODED: tl.constexpr,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Quantise x [R, C] by a `RowLayout` and store it at rows [R] of a pool, -1: nowhere."""
    C: tl.constexpr = x.shape[1]
    CODED_BYTES: tl.constexpr = CODED if CODES == "e4m3" else CODED // 2
    DATA_BYTES: tl.constexpr = CODED_BYTES + 2 * PLAIN
    GROUPS: tl.constexpr = 1 if CODED <= GROUP else C // GROUP
    column = tl.arange(0, C)[None, :]
    keep = (rows >= 0)[:, None]
    page = pool + (rows // PAGE).to(tl.int64)[:, None] * PAGE_BYTES
    data = page + (rows % PAGE)[:, None] * DATA_BYTES
    scaled, scale = quantise(tl.where(column < CODED, x, 0.0), GROUPS, CODES, SCALES, LEAST)
    if CODES == "e4m3":
        tl.store(data + column, e4m3_bits(scaled), mask=keep & (column < CODED))
    else:
        byte = tl.arange(0, C // 2)[None, :]
        tl.store(data + byte, e2m1_bytes(scaled), mask=keep & (byte < CODED_BYTES))
    if PLAIN > 0:
        plain = (data + CODED_BYTES).to(tl.pointer_type(tl.bfloat16), bitcast=True) + (column - CODED)
        tl.store(plain, x.to(tl.bfloat16), mask=keep & (column >= CODED) & (column < CODED + PLAIN))
    scales = page + PAGE * DATA_BYTES + (rows % PAGE)[:, None] * SCALE_BYTES
    group = tl.arange(0, GROUPS)[None, :]
    USED: tl.constexpr = (CODED + GROUP - 1) // GROUP
    if SCALES == "float32":
        tl.store(scales.to(tl.pointer_type(tl.float32), bitcast=True) + group, scale, mask=keep & (group < USED))
    else:
        # Groups behind the last one are padding, zero like every byte that is never written.
        stored = tl.where(group < USED, scale, tl.zeros_like(scale))
        tl.store(scales + group, stored, mask=keep & (group < SCALE_BYTES))
