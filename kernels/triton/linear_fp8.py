"""The product of FP8 weights and FP8 activations, scaled per 128 of K."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.common import power_of_two
from weft.kernels.triton.linear_parts import (
    add_splits,
    inverse_rms,
    load_scales,
    load_tokens,
    quantise_tokens,
    store_outputs,
)


@triton.jit
def _chunks(
    x, x_scales, norm, codes, scales, inverse, rows, keep, token_first, scale_pitch, group, row_first, first,
    last,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, QUANTISED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of the products of chunks first..last-1 of K: [BM, BN] float32."""
    CHUNKS: tl.constexpr = (K + 127) // 128
    row = row_first + tl.arange(0, BM)
    column = tl.arange(0, 128)
    # One address that moves, and places in its tile that do not: fewer registers than an address for each.
    weights = codes + row_first.to(tl.int64) * K
    place = tl.arange(0, BM)[:, None] * K + column[None, :]
    row_end = (group + 1) * R
    acc = tl.zeros([BM, BN], tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        mask = (row < row_end)[:, None]
        if K % 128 != 0:
            mask = mask & (chunk * 128 + column < K)[None, :]
        if R % BM == 0 and K % 128 == 0:
            w = tl.load(weights + chunk * 128 + place)
        else:
            w = tl.load(weights + chunk * 128 + place, mask=mask, other=0.0)
        w_scale = load_scales(scales + chunk * N, row_first, row_end, BM, N % 4 == 0 and R % 4 == 0)
        v = load_tokens(x, rows, keep, chunk * 128, inverse, norm, K, 128, NORM)
        if QUANTISED:
            q = v
            at = (group * CHUNKS + chunk).to(tl.int64) * scale_pitch
            x_scale = load_scales(x_scales + at, token_first, scale_pitch, BN, True)
        else:
            q, exponent = quantise_tokens(v)
            x_scale = power_of_two(exponent)
        # A product of its own for each chunk: Hopper's accumulates FP8 in few bits. Scales are powers of two, so
        # that whether their products with it are rounded apart or fused into the sum makes no difference.
        acc += tl.dot(w, tl.trans(q)) * (w_scale[:, None] * x_scale[None, :])
    return acc


@triton.jit(do_not_specialize=["tokens", "token_tiles"])
def fp8_linear(
    x, x_scales, norm, codes, scales, partial, locks, out, tokens, token_tiles, x_stride, group_stride,
    scale_pitch, out_stride, eps,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PER: tl.constexpr, SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr, NORM: tl.constexpr, QUANTISED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program: (tile of rows, tile of tokens, split of K), the split fastest; without PARALLEL all splits in turn.

    R rows of weights belong to a group, N in all; a split has PER chunks of 128. QUANTISED: x holds codes, and
    x_scales [groups * chunks, scale_pitch] a byte per token.
    """
    CHUNKS: tl.constexpr = (K + 127) // 128
    TILES: tl.constexpr = (R + BM - 1) // BM
    program = tl.program_id(0)
    tile = program // SPLITS if PARALLEL else program
    token_first = (tile % token_tiles) * BN
    row_tile = tile // token_tiles
    group = row_tile // TILES
    row_first = group * R + (row_tile % TILES) * BM
    token = token_first + tl.arange(0, BN)
    keep = token < tokens
    x += token_first.to(tl.int64) * x_stride + group.to(tl.int64) * group_stride
    rows = tl.arange(0, BN) * x_stride
    row = row_first + tl.arange(0, BM)
    end = (group + 1) * R
    inverse = inverse_rms(x, rows, keep, eps, K) if NORM else 1.0
    if PARALLEL:
        split = program % SPLITS
        part = _chunks(x, x_scales, norm, codes, scales, inverse, rows, keep, token_first, scale_pitch,
                       group, row_first, split * PER, tl.minimum((split + 1) * PER, CHUNKS),
                       R, N, K, NORM, QUANTISED, BM, BN, STAGES)  # fmt: skip
        add_splits(part, partial, locks, tile, split, out, token, keep, row, end, out_stride, SPLITS)
    elif SPLITS == 1:
        total = _chunks(x, x_scales, norm, codes, scales, inverse, rows, keep, token_first, scale_pitch,
                        group, row_first, 0, CHUNKS,
                        R, N, K, NORM, QUANTISED, BM, BN, STAGES)  # fmt: skip
        store_outputs(total, out, token, keep, row, end, out_stride)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        for split in tl.range(0, SPLITS, num_stages=1):
            total += _chunks(x, x_scales, norm, codes, scales, inverse, rows, keep, token_first, scale_pitch,
                             group, row_first, split * PER, tl.minimum((split + 1) * PER, CHUNKS),
                             R, N, K, NORM, QUANTISED, BM, BN, STAGES)  # fmt: skip
        store_outputs(total, out, token, keep, row, end, out_stride)
