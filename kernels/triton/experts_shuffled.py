"""FP4 weights in the layout of `ShuffledExperts`, made e4m3 by byte permutations: 7 instructions for 8 weights.

The eight sizes that a code may have, times the shift of its group of 32 columns, are eight e4m3 bytes: two
registers. A byte permutation picks four of them by four selectors of four bits, which is how the codes lie in the
word; signs are put beside them. The same bits as `lossless_fp8` makes, so the same products as `fp8_sums`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.experts_parts import scale_of, tokens_chunk

# 16 bytes of codes, 16 equal bytes of the low half's shift * 8, 16 of the high half's -> 16 e4m3 each. With shift
# s * 8 = z in every byte the table is 0, z, z + 8, z + 12 and z + 16, z + 20, z + 24, z + 28.
_TABLE = """
add.u32 {low}0, {z}, 0x0C080000;
and.b32 {low}0, {low}0, 0xFFFFFF00;
add.u32 {low}1, {z}, 0x1C181410;
"""
_WORD = """
and.b32 sel, ${word}, 0x77777777;
prmt.b32 ${low}, a0, a1, sel;
shr.b32 sel, sel, 16;
prmt.b32 ${high}, b0, b1, sel;
shl.b32 sel, ${word}, 4;
lop3.b32 ${low}, ${word}, 0x80808080, ${low}, 0xEA;
lop3.b32 ${high}, sel, 0x80808080, ${high}, 0xEA;
"""


def _asm() -> str:
    tables = _TABLE.format(low="a", z="$12") + _TABLE.format(low="b", z="$16")
    words = "".join(_WORD.format(word=8 + i, low=i, high=4 + i) for i in range(4))
    return "{\n.reg .b32 a0, a1, b0, b1, sel;" + tables + words + "}"


ASM = tl.constexpr(_asm())
CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))


@triton.jit
def e4m3_of(size, sign, z):
    """Codes' sizes 0..7 and signs 0 or 128, and shifts * 8 -> e4m3 bytes, by arithmetic."""
    lifted = z + (size << 2) - tl.where(size == 1, 4, 0)
    return (tl.where(size == 0, 0, lifted) | sign).to(tl.uint8)


@triton.jit
def lifted_codes(w, at, word, BM: tl.constexpr, USE_ASM: tl.constexpr):
    """Codes [BM, 64] of columns 0..63 and 64..127 of a chunk, e4m3. w + at: its bytes; word: scale words."""
    byte = tl.arange(0, 64)[None, :]
    place = 8 + 4 * (byte // 32)
    low_z = ((word[:, None] >> place) & 15) << 3
    high_z = ((word[:, None] >> (place + 8)) & 15) << 3
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [tl.load(w + at[:, None] + byte), low_z.to(tl.uint8), high_z.to(tl.uint8)],
            dtype=(tl.uint8, tl.uint8), is_pure=True, pack=16,
        )  # fmt: skip
    else:
        first = w + at[:, None] + byte // 4 * 4
        j = byte % 4
        shift = 4 * (j % 2)
        signs = tl.load(first + j).to(tl.int32)
        low_size = (tl.load(first + j // 2).to(tl.int32) >> shift) & 7
        high_size = (tl.load(first + 2 + j // 2).to(tl.int32) >> shift) & 7
        low = e4m3_of(low_size, signs & 128, low_z)
        high = e4m3_of(high_size, (signs & 8) << 4, high_z)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def shuffled_sums(
    w, w_scales, row, x, x_scales, xrow, here, N: tl.constexpr, K: tl.constexpr, CODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """w: one expert's blocks [N/64, chunks, 64, 64], w_scales [chunks, N padded to 64] -> [BM, BN] float32."""
    CHUNKS: tl.constexpr = (K + 127) // 128
    ROWS: tl.constexpr = (N + 63) // 64 * 64
    total = tl.zeros([BM, BN], tl.float32)
    row = tl.minimum(row, ROWS - 1)  # rows behind the last block are not stored
    first = (row // 64 * CHUNKS * 64 + row % 64) * 64
    for chunk in range(0, CHUNKS):
        word = tl.load(w_scales + chunk * ROWS + row)
        low, high = lifted_codes(w, first + chunk * 4096, word, BM, USE_ASM)
        tokens, token_scale = tokens_chunk(x, x_scales, xrow, here, chunk, K, CODED)
        left, right = tl.split(tl.permute(tl.reshape(tokens, [BN, 2, 64]), (0, 2, 1)))
        product = tl.dot(low, left.T)
        product = tl.dot(high, right.T, product)
        total += product * (scale_of(word & 255)[:, None] * token_scale[None, :])
    return total
