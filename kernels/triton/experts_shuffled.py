"""FP4 weights in the layout of `ShuffledExperts`, made e4m3 in registers: 5 instructions for 4 weights.

The eight sizes that a code may have, times the shift of its group of 32 columns, are eight e4m3 bytes: two
registers. A byte permutation picks four of them by four selectors of four bits: that is how codes lie in their
word; signs are put beside them. Rows and columns lie so that a thread's 16 bytes are its part of Hopper's left
operand in registers: nothing is exchanged. The same codes as those of `lossless_fp8`, in the same order, so the
same products as those of `fp8_sums`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.experts_parts import add_scaled, product_of, scale_of, tokens_chunk

# A group's table: with z its shift * 8, the bytes 0, z, z + 8, z + 12 and z + 16, z + 20, z + 24, z + 28.
_TABLE = """
prmt.b32 z, $12, 0, 0x444{group};
mad.lo.u32 a{group}, z, 0x01010100, 0x0C080000;
mad.lo.u32 b{group}, z, 0x01010101, 0x1C181410;
"""
# A word of codes -> four e4m3 of a column group of the first half, and four of the second.
_WORD = """
and.b32 sel, ${word}, 0x77777777;
prmt.b32 ${low}, a{group}, b{group}, sel;
shr.b32 sel, sel, 16;
prmt.b32 ${high}, a{other}, b{other}, sel;
shl.b32 sel, ${word}, 4;
lop3.b32 ${low}, ${word}, 0x80808080, ${low}, 0xEA;
lop3.b32 ${high}, sel, 0x80808080, ${high}, 0xEA;
"""


def lift_asm() -> str:
    """$0..$7: e4m3 codes, the first half's and the second's; $8..$11: words; $12: the groups' z in its bytes."""
    tables = "".join(_TABLE.format(group=g) for g in range(4))
    words = "".join(_WORD.format(word=8 + i, low=i, high=4 + i, group=i // 2, other=2 + i // 2) for i in range(4))
    return "{\n.reg .b32 a<4>, b<4>, z, sel;" + tables + words + "}"


ASM = tl.constexpr(lift_asm())
# 16 bytes are a thread's share of one row: 4 registers, and the row's one int32 for each of them.
CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 20))


@triton.jit
def lifted(size, sign, z):
    """Codes' sizes 0..7 and signs 0 or 128, and shifts * 8 -> e4m3 bytes, by arithmetic."""
    bits = z + (size << 2) - tl.where(size == 1, 4, 0)
    return (tl.where(size == 0, 0, bits) | sign).to(tl.uint8)


@triton.jit
def lifted_codes(w, at, shifts, BM: tl.constexpr, USE_ASM: tl.constexpr):
    """128 columns of BM rows -> e4m3 [BM, 128]. w + at [BM]: where the stored rows begin; shifts [BM]: theirs."""
    byte = tl.arange(0, 64)[None, :]
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [tl.load(w + at[:, None] + byte), tl.broadcast_to(shifts[:, None], [BM, 64])],
            dtype=(tl.uint8, tl.uint8), is_pure=True, pack=16,
        )  # fmt: skip
    else:
        word = w + at[:, None] + byte // 4 * 4
        j = byte % 4
        group = byte % 16 // 8
        signs = tl.load(word + j).to(tl.int32)
        low_size = (tl.load(word + j // 2).to(tl.int32) >> 4 * (j % 2)) & 7
        high_size = (tl.load(word + 2 + j // 2).to(tl.int32) >> 4 * (j % 2)) & 7
        low = lifted(low_size, signs & 128, (shifts[:, None] >> 8 * group) & 255)
        high = lifted(high_size, (signs & 8) << 4, (shifts[:, None] >> 8 * group + 16) & 255)
    both = tl.join(low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True))
    # Stored row (block, r, warp, lane / 4), stored column (lane % 4, i, j) -> in their order.
    both = tl.reshape(both, [BM // 64, 2, 4, 8, 4, 4, 4, 2])
    return tl.reshape(tl.permute(both, (0, 2, 1, 3, 7, 5, 4, 6)), [BM, 128])


@triton.jit
def shuffled_sums(
    w, w_shifts, w_scales, tile, x, x_scales, x_pitch, xrow, here, N: tl.constexpr, K: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """w: one expert's blocks [N/64, chunks, 4096], w_shifts and w_scales [chunks, N padded to 64] -> tile `tile`
    of its rows, [BM, BN] float32."""
    CHUNKS: tl.constexpr = (K + 127) // 128
    ROWS: tl.constexpr = (N + 63) // 64 * 64
    total = tl.zeros([BM, BN], tl.float32)
    row = tl.minimum(tile * BM + tl.arange(0, BM), ROWS - 1)  # rows behind the last block are not stored
    first = (row // 64 * CHUNKS * 64 + row % 64) * 64
    scale = tl.load(w_scales + row)
    for chunk in range(0, CHUNKS):
        # As in `fp8_sums`.
        next_scale = tl.load(w_scales + tl.minimum(chunk + 1, CHUNKS - 1) * ROWS + row)
        codes = lifted_codes(w, first + chunk * 4096, tl.load(w_shifts + chunk * ROWS + row), BM, USE_ASM)
        tokens, token_scale = tokens_chunk(x, x_scales, x_pitch, xrow, here, chunk, K, CODED)
        product = product_of(codes, tokens)
        total = add_scaled(total, product, scale_of(scale), token_scale)
        scale = next_scale
    return total
