"""Products of a tile of one expert's weight rows with a tile of tokens, for each format of weights.

Weights are the left operand, so that a token is a column of the product: nothing of its sum depends on how many
columns there are. K goes in chunks of 128, of which each starts from zero and is scaled when it is added: that is
the width of the scales, and as much as Hopper's FP8 products may add up in their few bits.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.common import power_of_two, quantise


@triton.jit
def scale_of(byte):
    """E8M0 -> float32; 0 for the scale of a row of zeros."""
    return power_of_two(byte.to(tl.int32) - 127)


@triton.jit
def tokens_chunk(x, x_scales, x_pitch, row, here, chunk, K: tl.constexpr, CODED: tl.constexpr):
    """128 columns of rows `row` of x: e4m3 [BN, 128] and scales [BN]; quantised here, unless x is codes, with
    scales [chunks, x_pitch] of all its rows."""
    k = chunk * 128 + tl.arange(0, 128)
    mask = here[:, None] & (k < K)[None, :] if K % 128 else here[:, None]
    at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    if CODED:
        codes = tl.load(at, mask=mask, other=0.0)
        # Twice, and the larger: a plain [BN] would be loaded by every thread for each of its columns.
        scale_at = x_scales + tl.cast(chunk, tl.int64) * x_pitch + row[:, None] + tl.arange(0, 2)[None, :] * 0
        return codes, scale_of(tl.max(tl.load(scale_at, mask=here[:, None], other=0), 1))
    else:
        scaled, byte = quantise(tl.load(at, mask=mask, other=0.0).to(tl.float32), 1, "e4m3", "e8m0", 1e-4)
        return scaled.to(tl.float8e4nv), scale_of(tl.max(byte, 1))


@triton.jit
def product_of(codes, tokens):
    """codes [BM, 128] times tokens [BN, 128] -> [BM, BN]. 8 tokens are multiplied as 16, half of them zeros that
    nothing was spent on: products of 8 columns are not everywhere the same instruction."""
    BM: tl.constexpr = codes.shape[0]
    if tokens.shape[0] == 8:
        bits = tokens.to(tl.uint8, bitcast=True)
        wide = tl.reshape(tl.permute(tl.join(bits, tl.zeros_like(bits)), (2, 0, 1)), [16, 128])
        product = tl.dot(codes, wide.to(tl.float8e4nv, bitcast=True).T)
        product, _ = tl.split(tl.permute(tl.reshape(product, [BM, 2, 8]), (0, 2, 1)))
    else:
        product = tl.dot(codes, tokens.T)
    return product


@triton.jit
def add_scaled(total, product, row_scale, token_scale):
    """total + product * row_scale * token_scale. Powers of two: what is added is exact, fma rounds as + does."""
    return tl.fma(product, row_scale[:, None] * token_scale[None, :], total)


@triton.jit
def fp8_sums(
    w, w_scales, row, x, x_scales, x_pitch, xrow, here, N: tl.constexpr, K: tl.constexpr, CODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """w: one expert's codes [N, K], w_scales [chunks, N]; rows `row` [BM] -> [BM, BN] float32."""
    CHUNKS: tl.constexpr = (K + 127) // 128
    total = tl.zeros([BM, BN], tl.float32)
    kept = tl.minimum(row, N - 1)  # rows behind the last are not stored
    scale = tl.load(w_scales + kept)
    for chunk in range(0, CHUNKS):
        # The compiler fetches ahead what products take, not scales; it carries a value over one chunk at most.
        next_scale = tl.load(w_scales + tl.minimum(chunk + 1, CHUNKS - 1) * N + kept)
        k = chunk * 128 + tl.arange(0, 128)
        at = w + kept[:, None] * K + k[None, :]
        codes = tl.load(at, mask=(k < K)[None, :], other=0.0) if K % 128 else tl.load(at)
        tokens, token_scale = tokens_chunk(x, x_scales, x_pitch, xrow, here, chunk, K, CODED)
        product = product_of(codes, tokens)
        total = add_scaled(total, product, scale_of(scale), token_scale)
        scale = next_scale
    return total


@triton.jit
def e2m1_value(code, scale):
    """Codes 0..15 times powers of two, float32."""
    size = code & 7
    bits = ((size >> 1) + 126) << 23 | (size & 1) << 22
    value = tl.where(size > 1, bits, tl.where(size == 1, 0x3F000000, 0)).to(tl.float32, bitcast=True)
    return tl.where(code > 7, -value, value) * scale


@triton.jit
def fp4_sums(
    w, w_scales, row, x, x_scales, x_pitch, xrow, here, N: tl.constexpr, K: tl.constexpr, CODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """w: one expert's e2m1 [N, K/2], w_scales [N, K/32] -> [BM, BN]: the bits that `fp8_sums` gives for the codes
    of `lossless_fp8`. For any architecture, quick on none."""
    GROUPS: tl.constexpr = K // 32
    total = tl.zeros([BM, BN], tl.float32)
    for chunk in range(0, tl.cdiv(K, 128)):
        byte = chunk * (64) + tl.arange(0, 64)
        mask = (row < N)[:, None] & (byte < K // 2)[None, :]
        packed = tl.load(w + row[:, None] * (K // 2) + byte[None, :], mask=mask, other=0).to(tl.int32)
        group = chunk * 4 + tl.arange(0, 4)
        mask = (row < N)[:, None] & (group < GROUPS)[None, :]
        scales = tl.load(w_scales + row[:, None] * GROUPS + group[None, :], mask=mask, other=0).to(tl.int32)
        base = tl.maximum(tl.max(scales, 1) - 6, 0)
        lift = power_of_two(tl.maximum(scales - base[:, None], -8))
        lifts = tl.reshape(tl.broadcast_to(lift[:, :, None], [BM, 4, 16]), [BM, 64])
        low, high = e2m1_value(packed & 15, lifts), e2m1_value(packed >> 4, lifts)
        codes = tl.reshape(tl.join(low, high), [BM, 128]).to(tl.float8e4nv)
        tokens, token_scale = tokens_chunk(x, x_scales, x_pitch, xrow, here, chunk, K, CODED)
        product = product_of(codes, tokens)
        total = add_scaled(total, product, scale_of(base), token_scale)
    return total


@triton.jit
def float_sums(
    w, row, x, xrow, here, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """w: one expert's [N, K], bfloat16 or float32, as x -> [BM, BN] float32."""
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = (row < N)[:, None] & (k < K)[None, :]
        rows = tl.load(w + row[:, None] * K + k[None, :], mask=mask, other=0.0)
        at = x + xrow.to(tl.int64)[:, None] * K + k[None, :]
        tokens = tl.load(at, mask=here[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(rows, tokens.T, total, input_precision="ieee")
    return total


@triton.jit
def swiglu(both, weight, limit):
    """[BM, BN] rows of gate and up in turn -> [BM / 2, BN], times the tokens' weights [BN]."""
    BM: tl.constexpr = both.shape[0]
    BN: tl.constexpr = both.shape[1]
    gate, up = tl.split(tl.permute(tl.reshape(both, [BM // 2, 2, BN]), (0, 2, 1)))
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
