"""The product of bfloat16 or float32 weights and activations, and the quantisation of activations by itself."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.linear_parts import add_splits, inverse_rms, load_tokens, quantise_tokens, store_outputs


@triton.jit
def _columns(
    x, norm, weight, inverse, rows, keep, row_first, row_end, first, last,
    R: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over columns first..last-1 of K, in steps of BK: [BM, BN] float32."""
    row = row_first + tl.arange(0, BM)
    column = tl.arange(0, BK)
    weights = weight + row_first.to(tl.int64) * K
    place = tl.arange(0, BM)[:, None] * K + column[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        if R % BM == 0 and K % BK == 0:
            w = tl.load(weights + start + place)
        else:
            w = tl.load(
                weights + start + place, mask=(row < row_end)[:, None] & (start + column < K)[None, :], other=0.0
            )
        v = load_tokens(x, rows, keep, start, inverse, norm, K, BK, NORM)
        acc = tl.dot(w, tl.trans(v.to(w.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens", "token_tiles"])
def float_linear(
    x, norm, weight, partial, locks, out, tokens, token_tiles, x_stride, group_stride, out_stride, eps,
    R: tl.constexpr, K: tl.constexpr, PER: tl.constexpr, SPLITS: tl.constexpr, PARALLEL: tl.constexpr,
    NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs and splits as in `fp8_linear`; a split has PER times 128 columns."""
    TILES: tl.constexpr = (R + BM - 1) // BM
    program = tl.program_id(0)
    tile = program // SPLITS if PARALLEL else program
    row_tile = tile // token_tiles
    group = row_tile // TILES
    row_first = group * R + (row_tile % TILES) * BM
    token_first = (tile % token_tiles) * BN
    token = token_first + tl.arange(0, BN)
    keep = token < tokens
    x += token_first.to(tl.int64) * x_stride + group.to(tl.int64) * group_stride
    rows = tl.arange(0, BN) * x_stride
    row = row_first + tl.arange(0, BM)
    end = (group + 1) * R
    inverse = inverse_rms(x, rows, keep, eps, K) if NORM else 1.0
    if PARALLEL:
        split = program % SPLITS
        first, last = split * PER * 128, tl.minimum((split + 1) * PER * 128, K)
        part = _columns(x, norm, weight, inverse, rows, keep, row_first, end, first, last,
                        R, K, NORM, BM, BN, BK, STAGES)  # fmt: skip
        add_splits(part, partial, locks, tile, split, out, token, keep, row, end, out_stride, SPLITS)
    elif SPLITS == 1:
        total = _columns(x, norm, weight, inverse, rows, keep, row_first, end, 0, K,
                         R, K, NORM, BM, BN, BK, STAGES)  # fmt: skip
        store_outputs(total, out, token, keep, row, end, out_stride)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        for split in tl.range(0, SPLITS, num_stages=1):
            first, last = split * PER * 128, tl.minimum((split + 1) * PER * 128, K)
            total += _columns(x, norm, weight, inverse, rows, keep, row_first, end, first, last,
                              R, K, NORM, BM, BN, BK, STAGES)  # fmt: skip
        store_outputs(total, out, token, keep, row, end, out_stride)


@triton.jit(do_not_specialize=["tokens"])
def quantise_rows(
    x, norm, codes, scales, tokens, x_stride, group_stride, scale_pitch, eps,
    K: tl.constexpr, GROUPS: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (t, c, g): ROWS tokens, CHUNKS chunks of 128 columns, of group g. codes [T, GROUPS, K], scales
    [GROUPS, chunks, scale_pitch]."""
    ALL: tl.constexpr = (K + 127) // 128
    group = tl.program_id(2)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = token < tokens
    rows = token.to(tl.int64) * x_stride + group.to(tl.int64) * group_stride
    inverse = inverse_rms(x, rows, keep, eps, K) if NORM else 1.0
    to = token.to(tl.int64) * (GROUPS * K) + group * K
    for index in tl.static_range(CHUNKS):
        chunk = tl.program_id(1) * CHUNKS + index
        if chunk < ALL:
            v = load_tokens(x, rows, keep, chunk * 128, inverse, norm, K, 128, NORM)
            q, exponent = quantise_tokens(v)
            column = chunk * 128 + tl.arange(0, 128)
            byte = q.to(tl.uint8, bitcast=True)
            tl.store(codes + to[:, None] + column[None, :], byte, mask=keep[:, None] & (column < K)[None, :])
            at = (group * ALL + chunk).to(tl.int64) * scale_pitch + token
            tl.store(scales + at, (exponent + 127).to(tl.uint8), mask=keep)
