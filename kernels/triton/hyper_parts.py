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
def load_parts(y, token, d, mask, D: tl.constexpr, PARTS: tl.constexpr):
    """y [*, PARTS, D] at token and d, eight tiles of which the first PARTS count; as they are stored."""
    at = y + token * (PARTS * D) + d
    p0 = tl.load(at, mask=mask, other=0.0)
    p1 = tl.load(at + D, mask=mask, other=0.0) if PARTS > 1 else p0
    p2 = tl.load(at + 2 * D, mask=mask, other=0.0) if PARTS > 2 else p0
    p3 = tl.load(at + 3 * D, mask=mask, other=0.0) if PARTS > 3 else p0
    p4 = tl.load(at + 4 * D, mask=mask, other=0.0) if PARTS > 4 else p0
    p5 = tl.load(at + 5 * D, mask=mask, other=0.0) if PARTS > 5 else p0
    p6 = tl.load(at + 6 * D, mask=mask, other=0.0) if PARTS > 6 else p0
    p7 = tl.load(at + 7 * D, mask=mask, other=0.0) if PARTS > 7 else p0
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def load_mix(mix, token, valid):
    """A row of mix, [BT, 32] with zeros behind it: as one tile, of which shuffles make the parts. Loads of single
    columns would each go through shared memory, with barriers."""
    column = tl.arange(0, 32)[None, :]
    return tl.load(mix + token * 24 + column, mask=valid & (column < 24), other=0.0)


@triton.jit
def four_of(tile, g: tl.constexpr):
    """tile [BT, 8, 4] -> its four columns at g, [BT, 1] each."""
    chosen = tl.sum(tl.where(tl.arange(0, 8)[None, :, None] == g, tile, 0.0), 1)
    even, odd = tl.split(tl.reshape(chosen, [tile.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit
def spread(h, y, post, c0, c1, c2, c3):
    """post * y + sum over j of c_j * h_j, rounded as the streams h (four tiles) are stored."""
    out = tl.fma(c0, h[0].to(tl.float32), post * y)
    out = tl.fma(c1, h[1].to(tl.float32), out)
    out = tl.fma(c2, h[2].to(tl.float32), out)
    out = tl.fma(c3, h[3].to(tl.float32), out)
    return out.to(h[0].dtype)


@triton.jit
def load_tile(h, y, mix, token, d, mask, valid, D: tl.constexpr, PARTS: tl.constexpr):
    """What `new_streams` works on: old streams, parts and mix, in registers as they are stored."""
    old = load_streams(h, token, d, mask, D)
    if PARTS == 0:
        return old, old, old[0]
    else:
        return old, load_parts(y, token, d, mask, D, PARTS), load_mix(mix, token, valid)


@triton.jit
def new_streams(old, parts, mix, PARTS: tl.constexpr):
    """The streams behind a sublayer, four tiles [BT, BD]; those before it if it has no output (PARTS = 0)."""
    if PARTS == 0:
        return old
    else:
        total = parts[0].to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += parts[part].to(tl.float32)
        total = total.to(old[0].dtype).to(tl.float32)
        tile = tl.reshape(mix, [mix.shape[0], 8, 4])
        post = four_of(tile, 1)
        c0, c1, c2, c3 = four_of(tile, 2), four_of(tile, 3), four_of(tile, 4), four_of(tile, 5)
        n0 = spread(old, total, post[0], c0[0], c1[0], c2[0], c3[0])
        n1 = spread(old, total, post[1], c0[1], c1[1], c2[1], c3[1])
        n2 = spread(old, total, post[2], c0[2], c1[2], c2[2], c3[2])
        n3 = spread(old, total, post[3], c0[3], c1[3], c2[3], c3[3])
        return n0, n1, n2, n3


@triton.jit
def store_streams(out, n, token, d, mask, D: tl.constexpr):
    for k in tl.static_range(4):
        tl.store(out + token * (4 * D) + k * D + d, n[k], mask=mask)


@triton.jit
def load_mixer(fn, d, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """fn [ROWS, 4 * D] -> what it has for each stream and d [1, BD]: four tiles [COLS, BD], rows as
    `column_row` says.

    In one load: between several, each of which passes through shared memory, there would be barriers.
    """
    row, kept = column_row(tl.arange(0, COLS)[None, :, None], ROWS)
    stream = tl.arange(0, 4)[:, None, None]
    at = fn + row * (4 * D) + stream * D + d[None, :, :]
    w = tl.load(at, mask=kept & (d < D)[None, :, :], other=0.0)
    w = tl.reshape(tl.permute(w, (1, 2, 0)), [COLS, d.shape[1], 2, 2])
    even, odd = tl.split(w)
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def pieces(weight, SPLIT: tl.constexpr):
    """[COLS, BD] float32 -> [BD, COLS] three times. SPLIT: as the three bfloat16 whose sum it is, exactly, so that
    products with bfloat16 are exact in float32."""
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
