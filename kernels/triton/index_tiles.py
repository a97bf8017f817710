# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Tiles of the lightning indexer: keys from pages or gathered, queries, and the score of one for the other.

fp8 keys meet fp8 queries in one product (Hopper sums such products with fewer bits than float32: 13 behind the
point of the largest one). fp4 keys and queries become bfloat16, exactly: three bits times a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_places(
    tables, P, owner, column, seen, PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr,
    SCALE_PAGE: tl.constexpr, SCALES_AT: tl.constexpr, DATA: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Elements at which the codes and the scales of some keys of `owner` begin: two [BK] int64.

    owner: the sequence (PAGED) or the first of its gathered rows.
    """
    if PAGED:
        page = tl.load(tables + owner * P + column // PAGE, mask=seen, other=0).to(tl.int64)
        place = column % PAGE
        return page * DATA_PAGE + place * DATA, page * SCALE_PAGE + SCALES_AT + place * SCALE
    else:
        row = tl.cast(owner, tl.int64) + column
        return row * DATA, row * SCALE


@triton.jit
def fp4_halves(codes, scales, ROWS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """Packed codes [ROWS, HALF] and biased exponents [ROWS, GROUPS] -> even and odd channels, bfloat16.

    The three bits of a magnitude, put where float32 has exponent and mantissa, are its value times 2^-126.
    """
    factor = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    spread = tl.expand_dims(factor, 2).broadcast_to((ROWS, GROUPS, HALF // GROUPS))
    factor = tl.reshape(spread, (ROWS, HALF))
    code = codes.to(tl.int32)
    even = ((code & 7) << 22) | ((code & 8) << 28)
    odd = ((code & 0x70) << 18) | ((code & 0x80) << 24)
    even = even.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor
    odd = odd.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor
    return even.to(tl.bfloat16), odd.to(tl.bfloat16)


@triton.jit
def load_fp8(codes, scales, at, scale_at, seen, DIM: tl.constexpr, BD: tl.constexpr):
    """A tile of keys [BK, BD] and their scales [BK]."""
    channel = tl.arange(0, BD)
    mask = seen[:, None] & (channel < DIM)[None, :]
    tile = tl.load(codes + at[:, None] + channel[None, :], mask=mask, other=0.0)
    return tile, tl.load(scales + scale_at, mask=seen, other=0.0)


@triton.jit
def load_fp4(
    codes, scales, at, scale_at, seen, ROWS: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Even and odd channels of keys or heads: two [ROWS, BD / 2] bfloat16, zeros from DIM / 2 on."""
    pair = tl.arange(0, BD // 2)
    packed = tl.load(codes + at[:, None] + pair, mask=seen[:, None] & (pair < DIM // 2)[None, :], other=0)
    exponents = tl.load(scales + scale_at[:, None] + tl.arange(0, GROUPS)[None, :], mask=seen[:, None], other=0)
    return fp4_halves(packed, exponents, ROWS, BD // 2, GROUPS)


@triton.jit
def load_query(
    q, q_scales, weights, token, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """One token's heads, as one tile or as even and odd channels, and their weights, 0 for heads it has not."""
    head = tl.arange(0, BN)
    here = head < N
    row = tl.cast(token, tl.int64) * N + head
    weight = tl.load(weights + row, mask=here, other=0.0)
    if FP4:
        even, odd = load_fp4(q, q_scales, row * (DIM // 2), row * GROUPS, here, BN, DIM, BD, GROUPS)
        return even, odd, weight
    else:
        channel = tl.arange(0, BD)
        mask = here[:, None] & (channel < DIM)[None, :]
        tile = tl.load(q + row[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
        return tile, tile, weight


@triton.jit
def load_keys(
    codes, scales, tables, P, owner, column, seen, PAGED: tl.constexpr, PAGE: tl.constexpr,
    DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr, SCALES_AT: tl.constexpr, DIM: tl.constexpr,
    BD: tl.constexpr, GROUPS: tl.constexpr, FP4: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Keys `column` of `owner`, as one tile or as even and odd channels, and their scales."""
    DATA: tl.constexpr = DIM // 2 if FP4 else DIM
    at, scale_at = key_places(
        tables, P, owner, column, seen, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, DATA, GROUPS
    )
    if FP4:
        even, odd = load_fp4(codes, scales, at, scale_at, seen, BK, DIM, BD, GROUPS)
        return even, odd, tl.full((BK,), 1.0, tl.float32)
    else:
        tile, scale = load_fp8(codes, scales, at, scale_at, seen, DIM, BD)
        return tile, tile, scale


@triton.jit
def scores(keys, more_keys, scale, heads, more_heads, weight, FP4: tl.constexpr):
    """[BK] scores of a tile of keys for one token."""
    product = tl.dot(keys, heads.T)
    if FP4:
        product = tl.dot(more_keys, more_heads.T, product)
    return tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1) * scale
