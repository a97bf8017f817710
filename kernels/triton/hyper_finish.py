"""The second launch of hyper-connections: gates and matrices from the blocks' sums, gather and norm.

Compiled without fusing multiplications and additions by itself, as in `hyper_parts`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.common import rms_scale


@triton.jit
def sigmoid(x):
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.div_rn(one, 1.0 + tl.exp(-x))


@triton.jit
def inverse_rms(square, eps, COUNT: tl.constexpr):
    """1 / sqrt(square / COUNT + eps) of a scalar sum of squares."""
    one = tl.full([1], 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(tl.fma(one * square, 1.0 / COUNT, one * eps)))


@triton.jit
def softmax_row(a, b, c, d, eps):
    """Four logits -> their softmax plus eps."""
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    root = tl.rsqrt((a + b) + (c + d))
    scale = root * root
    return tl.fma(a, scale, eps), tl.fma(b, scale, eps), tl.fma(c, scale, eps), tl.fma(d, scale, eps)


@triton.jit
def divide(q, m0, m1, m2, m3, v, eps):
    """Four lines of the matrix, whose entries m0, m1, m2, m3 (four each) are scaled by v the other way, divided by
    their sums plus eps: what their entries are divided by in all, from q before, and its inverse."""
    a = tl.fma(m0[1], v[1], tl.fma(m0[0], v[0], q[0] * eps)) + tl.fma(m0[3], v[3], m0[2] * v[2])
    b = tl.fma(m1[1], v[1], tl.fma(m1[0], v[0], q[1] * eps)) + tl.fma(m1[3], v[3], m1[2] * v[2])
    c = tl.fma(m2[1], v[1], tl.fma(m2[0], v[0], q[2] * eps)) + tl.fma(m2[3], v[3], m2[2] * v[2])
    d = tl.fma(m3[1], v[1], tl.fma(m3[0], v[0], q[3] * eps)) + tl.fma(m3[3], v[3], m3[2] * v[2])
    e, f, g, h = tl.rsqrt(a), tl.rsqrt(b), tl.rsqrt(c), tl.rsqrt(d)
    return (a, b, c, d), (e * e, f * f, g * g, h * h)


@triton.jit
def column_of(m0, m1, m2, m3, k: tl.constexpr):
    return m0[k], m1[k], m2[k], m3[k]


@triton.jit
def balance(at, mask, eps, ITERATIONS: tl.constexpr):
    """Sinkhorn in place of 4 x 4 logits at `at` [N]: one matrix a lane, in its registers.

    The matrix is M_jk * r_j * c_k: M stays, and only the scales change. Dividing row j by its sum plus eps makes
    1 / r_j to sum over k of M_jk * c_k + eps / r_j; so q = 1 / r is what is kept. Each step waits for the last, so
    reciprocals are squares of rsqrt, within 2^-21.8: two instructions, where a rounded quotient branches.
    """
    m0 = load_row(at, mask, eps)
    m1 = load_row(at + 4, mask, eps)
    m2 = load_row(at + 8, mask, eps)
    m3 = load_row(at + 12, mask, eps)
    k0, k1 = column_of(m0, m1, m2, m3, 0), column_of(m0, m1, m2, m3, 1)
    k2, k3 = column_of(m0, m1, m2, m3, 2), column_of(m0, m1, m2, m3, 3)
    one = tl.full(m0[0].shape, 1.0, tl.float32)
    r = (one, one, one, one)
    rows = r
    columns, c = divide(r, k0, k1, k2, k3, r, eps)
    for _ in range(ITERATIONS - 1):
        rows, r = divide(rows, m0, m1, m2, m3, c, eps)
        columns, c = divide(columns, k0, k1, k2, k3, r, eps)
    store_row(at, mask, m0, r[0], c)
    store_row(at + 4, mask, m1, r[1], c)
    store_row(at + 8, mask, m2, r[2], c)
    store_row(at + 12, mask, m3, r[3], c)


@triton.jit
def load_row(at, mask, eps):
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    c, d = tl.load(at + 2, mask=mask, other=0.0), tl.load(at + 3, mask=mask, other=0.0)
    return softmax_row(a, b, c, d, eps)


@triton.jit
def store_row(at, mask, m, r, c):
    for k in tl.static_range(4):
        tl.store(at + k, m[k] * r * c[k], mask=mask)


@triton.jit
def matrices(
    group,
    partial,
    base,
    scale,
    mix,
    tokens,
    norm_eps,
    hc_eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """post and comb of tokens from group * GROUP on: their logits first, in mix, then a matrix a lane."""
    column = tl.arange(0, COLS)
    block = tl.arange(0, PADDED)[:, None]
    kept = (column >= 8) & (column < ROWS + 4)
    shift = tl.load(base + column - 4, mask=kept, other=0.0)
    factor = tl.load(scale + tl.where(column < 12, 1, 2), mask=kept, other=0.0)
    for i in range(GROUP):
        token = group.to(tl.int64) * GROUP + i
        blocks = tl.where(token < tokens, BLOCKS, 0)
        edge = tl.where(token < tokens, ROWS + 4, 0)
        mask = (block < blocks) & (kept | (column == 4))[None, :]
        sums = tl.sum(
            tl.load(partial + (token * BLOCKS + block) * COLS + column[None, :], mask=mask, other=0.0), 0
        )
        inverse = inverse_rms(tl.sum(tl.where(column == 4, sums, 0.0), 0), norm_eps, 4 * D)
        logit = tl.fma(sums * inverse, factor, shift)
        post = 2.0 * sigmoid(logit)
        tl.store(mix + token * ROWS + column - 4, tl.where(column < 12, post, logit), mask=kept & (column < edge))
    tl.debug_barrier()
    lane = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    balance(mix + lane * ROWS + 8, lane < tokens, hc_eps, ITERATIONS)


@triton.jit
def gather(
    token,
    partial,
    h,
    norm,
    base,
    scale,
    x,
    mix,
    norm_eps,
    hc_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """pre of one token, and its streams gathered by it and normalised."""
    d = tl.arange(0, WIDTH)[None, :]
    at = h + token * (4 * D) + d
    h0 = tl.load(at, mask=d < D, other=0.0)
    h1 = tl.load(at + D, mask=d < D, other=0.0)
    h2 = tl.load(at + 2 * D, mask=d < D, other=0.0)
    h3 = tl.load(at + 3 * D, mask=d < D, other=0.0)
    weight = tl.load(norm + d, mask=d < D, other=0.0)
    column = tl.arange(0, 8)
    block = tl.arange(0, PADDED)[:, None]
    mask = (block < BLOCKS) & (column < 5)[None, :]
    sums = tl.sum(tl.load(partial + (token * BLOCKS + block) * COLS + column[None, :], mask=mask, other=0.0), 0)
    inverse = inverse_rms(tl.sum(tl.where(column == 4, sums, 0.0), 0), norm_eps, 4 * D)
    logit = tl.fma(sums * inverse, tl.load(scale), tl.load(base + column, mask=column < 4, other=0.0))
    gate = sigmoid(logit) + hc_eps
    if ROWS > 4:
        tl.store(mix + token * ROWS + column, gate, mask=column < 4)
    out = tl.sum(tl.where(column == 0, gate, 0.0), 0) * h0.to(tl.float32)
    out = tl.fma(tl.sum(tl.where(column == 1, gate, 0.0), 0), h1.to(tl.float32), out)
    out = tl.fma(tl.sum(tl.where(column == 2, gate, 0.0), 0), h2.to(tl.float32), out)
    out = tl.fma(tl.sum(tl.where(column == 3, gate, 0.0), 0), h3.to(tl.float32), out)
    out = out * rms_scale(out, norm_eps, D) * weight
    tl.store(x + token * D + d, out.to(x.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=("tokens",))
def finish(
    partial,
    h,
    norm,
    base,
    scale,
    x,
    mix,
    tokens,
    norm_eps,
    hc_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Programs of matrices first, which take longest; then one a token. ROWS = 4: no matrices."""
    program = tl.program_id(0)
    groups = 0
    if ROWS > 4:
        groups = tl.cdiv(tokens, GROUP)
        if program < groups:
            matrices(
                program, partial, base, scale, mix, tokens, norm_eps, hc_eps, D, ROWS, COLS, BLOCKS, PADDED,
                ITERATIONS, GROUP,
            )  # fmt: skip
    if program >= groups:
        token = (program - groups).to(tl.int64)
        gather(
            token, partial, h, norm, base, scale, x, mix, norm_eps, hc_eps, D, WIDTH, ROWS, COLS, BLOCKS, PADDED
        )
