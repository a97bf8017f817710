"""What the products of linears share: a tile of activations, its norm and codes, and sums of split products.

Weights are the rows of a product and tokens its columns, so that a few tokens fill a matrix instruction. A token's
bits must not depend on the width of its tile: everything here is elementwise, exact, or in an order of its own.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.common import power_of_two, scale_exponent


@triton.jit
def inverse_rms(x, rows, keep, eps, K: tl.constexpr):
    """Rows of K at x + rows [R] -> [R, 1] 1 / sqrt(mean of squares + eps).

    Columns of the same place in each 128 are added first to last. The layout of a tile, and with it the order in
    which those sums would be added, is chosen by the compiler for every kernel and width: so they are added as
    integers, whose sum has no order, in units 2^-41 of the largest's power of two.
    """
    R: tl.constexpr = rows.shape[0]
    column = tl.arange(0, 128)
    total = tl.zeros([R, 128], tl.float32)
    for start in tl.range(0, K, 128, loop_unroll_factor=4):
        inside = keep[:, None] & (start + column < K)[None, :]
        v = tl.load(x + rows[:, None] + (start + column)[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(v, v, total)
    top = tl.max(total, 1)[:, None].to(tl.int32, bitcast=True)
    shift = 40 - tl.maximum((top >> 23) - 127, -80)
    whole = tl.sum((total * power_of_two(shift)).to(tl.int64), 1)[:, None]
    square = tl.fma(whole.to(tl.float32) * power_of_two(-shift), 1.0 / K, eps)
    return tl.div_rn(tl.full([R, 1], 1.0, tl.float32), tl.sqrt_rn(square))


@triton.jit
def load_tokens(x, rows, keep, start, inverse, norm, K: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """WIDTH columns from `start` on of the rows at x + rows [R], zeros from K on; with NORM, times inverse [R, 1]
    and the norm's weight, rounded to x's type."""
    column = start + tl.arange(0, WIDTH)
    inside = keep[:, None]
    if K % WIDTH != 0:
        inside = inside & (column < K)[None, :]
    v = tl.load(x + start + (rows[:, None] + tl.arange(0, WIDTH)[None, :]), mask=inside, other=0.0)
    if NORM:
        weight = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
        v = (v.to(tl.float32) * inverse * weight[None, :]).to(v.dtype)
    return v


@triton.jit
def quantise_tokens(v):
    """v [R, 128] -> e4m3 codes, and each row's exponent of scale: the least power of two that fits amax, 1e-4 at
    least."""
    v = v.to(tl.float32)
    exponent = scale_exponent(tl.maximum(tl.max(tl.abs(v), 1), 1e-4), "e4m3")
    return (v * power_of_two(-exponent)[:, None]).to(tl.float8e4nv), exponent


@triton.jit
def load_scales(scales, first, end, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """SIZE bytes of E8M0 from scales + first on, 0 from scales + end on -> [SIZE] float32; byte 0 gives 0.

    WORDS: both are multiples of 4. Then four bytes are loaded as one word: what can be copied ahead of its use.
    """
    if WORDS:
        at = first + 4 * tl.arange(0, SIZE // 4)
        words = tl.load((scales + at).to(tl.pointer_type(tl.int32), bitcast=True), mask=at < end, other=0)
        byte = tl.reshape((words[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255, [SIZE])
    else:
        at = first + tl.arange(0, SIZE)
        byte = tl.load(scales + at, mask=at < end, other=0).to(tl.int32)
    return (byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_outputs(total, out, token, keep, row, end, out_stride):
    """total [R rows, C tokens] -> out[token, row] for rows below `end`."""
    at = token.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(out + at, tl.trans(total).to(out.dtype.element_ty), mask=keep[:, None] & (row < end)[None, :])


@triton.jit
def add_splits(part, partial, locks, tile, split, out, token, keep, row, end, out_stride, SPLITS: tl.constexpr):
    """Leave one split's product [R rows, C tokens] in `partial` [tiles, SPLITS, C, R]; whoever is the last of a
    tile to do so adds them all, first to last, stores, and sets the tile's counter back."""
    R: tl.constexpr = part.shape[0]
    C: tl.constexpr = part.shape[1]
    place = tl.arange(0, C)[:, None] * R + tl.arange(0, R)[None, :]
    base = partial + tile.to(tl.int64) * (SPLITS * C * R)
    tl.store(base + split * (C * R) + place, tl.trans(part), mask=keep[:, None])
    tl.debug_barrier()
    if tl.atomic_add(locks + tile, 1, sem="acq_rel") == SPLITS - 1:
        total = tl.zeros([C, R], tl.float32)
        # A few tokens' parts are all on their way at once; more would not fit in registers.
        for other in tl.range(0, SPLITS, num_stages=1, loop_unroll_factor=SPLITS if C <= 16 else 1):
            total += tl.load(base + other * (C * R) + place, mask=keep[:, None], other=0.0, cache_modifier=".cg")
        at = token.to(tl.int64)[:, None] * out_stride + row[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=keep[:, None] & (row < end)[None, :])
        tl.store(locks + tile, 0)
