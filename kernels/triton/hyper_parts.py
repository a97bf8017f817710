"""Device functions of hyper-connections: streams spread, products with the mixer, Sinkhorn.

Sums of products are written as explicit fused multiply-adds, and the kernels are compiled without fusing others:
so that every way to launch them, one tile a program or many, gives a row the same bits."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_streams(h, token, d, mask, D: tl.constexpr):
    """h [*, 4, D] at token [BT, 1] and d [1, BD], as they are stored."""
    at = h + token * (4 * D) + d
    h0 = tl.load(at, mask=mask, other=0.0)
    h1 = tl.load(at + D, mask=mask, other=0.0)
    h2 = tl.load(at + 2 * D, mask=mask, other=0.0)
    h3 = tl.load(at + 3 * D, mask=mask, other=0.0)
    return h0, h1, h2, h3


@triton.jit
def sum_parts(y, token, d, mask, D: tl.constexpr, PARTS: tl.constexpr, dtype: tl.constexpr):
    """y [*, PARTS, D] -> the sum over its parts, left to right, rounded to dtype: float32 [BT, BD]."""
    at = y + token * (PARTS * D) + d
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * D, mask=mask, other=0.0).to(tl.float32)
    return total.to(dtype).to(tl.float32)


@triton.jit
def load_mix(mix, token, valid):
    """post and the four rows of comb, five times four tiles [BT, 1].

    Loaded as one tile, of which shuffles make the parts: loads of single columns would each go through shared
    memory, with barriers.
    """
    column = tl.arange(0, 32)[None, :]
    tile = tl.load(mix + token * 24 + column, mask=valid & (column < 24), other=0.0)
    tile = tl.reshape(tile, [tile.shape[0], 8, 4])
    p = four_of(tile, 1)
    return p, four_of(tile, 2), four_of(tile, 3), four_of(tile, 4), four_of(tile, 5)


@triton.jit
def four_of(tile, g: tl.constexpr):
    """tile [BT, 8, 4] -> its four columns at g, [BT, 1] each."""
    chosen = tl.sum(tl.where(tl.arange(0, 8)[None, :, None] == g, tile, 0.0), 1)
    even, odd = tl.split(tl.reshape(chosen, [tile.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit
def spread(h, y, coefficients, k: tl.constexpr):
    """post_k * y + sum over j of comb[j, k] * h_j, rounded as the streams h (four tiles) are stored."""
    out = coefficients[0][k] * y
    for j in tl.static_range(4):
        out = tl.fma(coefficients[1 + j][k], h[j].to(tl.float32), out)
    return out.to(h[0].dtype)


@triton.jit
def new_streams(h, y, mix, token, d, mask, valid, D: tl.constexpr, PARTS: tl.constexpr):
    """The streams behind a sublayer, four tiles [BT, BD]; those before it if it has no output (PARTS = 0)."""
    old = load_streams(h, token, d, mask, D)
    if PARTS == 0:
        return old
    else:
        total = sum_parts(y, token, d, mask, D, PARTS, h.dtype.element_ty)
        coefficients = load_mix(mix, token, valid)
        n0, n1 = spread(old, total, coefficients, 0), spread(old, total, coefficients, 1)
        n2, n3 = spread(old, total, coefficients, 2), spread(old, total, coefficients, 3)
        return n0, n1, n2, n3


@triton.jit
def store_streams(out, n, token, d, mask, D: tl.constexpr):
    for k in tl.static_range(4):
        tl.store(out + token * (4 * D) + k * D + d, n[k], mask=mask)


@triton.jit
def load_mixer(
    fn, d, k: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr
):
    """fn [ROWS, 4 * D], what it has for stream k and d [1, BD] -> [BD, COLS], columns as `column_row` says. SPLIT:
    as the three bfloat16 whose sum it is, exactly, so that products with bfloat16 are exact in float32."""
    column = tl.arange(0, COLS)[:, None]
    row, kept = column_row(column, ROWS)
    weight = tl.load(fn + row * (4 * D) + k * D + d, mask=kept & (d < D), other=0.0)
    if SPLIT:
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.trans(high), tl.trans(middle), tl.trans(low)
    else:
        return tl.trans(weight), tl.trans(weight), tl.trans(weight)


@triton.jit
def column_row(column, ROWS: tl.constexpr):
    """Sums lie in columns 0..3 (pre), 4 (squares), 8..27 (post, comb): what is gathered first is in 32 bytes. The
    row of fn behind a column, and whether there is one."""
    return tl.where(column < 4, column, column - 4), (column < 4) | ((column >= 8) & (column < ROWS + 4))


@triton.jit
def mixer_sums(n, w0, w1, w2, w3, COLS: tl.constexpr):
    """Products of four tiles n_k [BT, BD] with w_k [BD, COLS] (three pieces each), and n's squares in column 4."""
    BT: tl.constexpr = n[0].shape[0]
    high = tl.zeros([BT, COLS], tl.float32)
    middle = tl.zeros([BT, COLS], tl.float32)
    low = tl.zeros([BT, COLS], tl.float32)
    high, middle, low = add_products(n[0], w0, high, middle, low)
    high, middle, low = add_products(n[1], w1, high, middle, low)
    high, middle, low = add_products(n[2], w2, high, middle, low)
    high, middle, low = add_products(n[3], w3, high, middle, low)
    first = n[0].to(tl.float32)
    square = first * first
    for k in tl.static_range(1, 4):
        wide = n[k].to(tl.float32)
        square = tl.fma(wide, wide, square)
    column = tl.arange(0, COLS)[None, :]
    return tl.where(column == 4, tl.sum(square, 1)[:, None], high + (middle + low))


@triton.jit
def add_products(n, w, high, middle, low):
    """Three sums apart: products in one wait for each other."""
    if n.dtype == tl.bfloat16:
        return tl.dot(n, w[0], high), tl.dot(n, w[1], middle), tl.dot(n, w[2], low)
    else:
        return tl.dot(n, w[0], high, input_precision="ieee"), middle, low


@triton.jit
def store_sums(partial, sums, token, valid, block, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """sums [BT, COLS] -> partial [*, BLOCKS, COLS] at token and block."""
    COLS: tl.constexpr = sums.shape[1]
    column = tl.arange(0, COLS)[None, :]
    _, kept = column_row(column, ROWS)
    tl.store(partial + (token * BLOCKS + block) * COLS + column, sums, mask=valid & (kept | (column == 4)))
