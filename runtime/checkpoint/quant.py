"""The weight formats of the released files: FP8 in 128x128 blocks, FP4 in groups of 32 columns.

- FP8: value = e4m3 * scale[row // 128, column // 128], grid ceil(rows/128) x ceil(columns/128).
- FP4: value = e2m1 * scale[row, column // 32]; two columns in a byte, the even one in the low
  nibble; code 0..7 is 0, .5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign.
- Scales are E8M0: byte b is 2^(b-127), 255 is NaN.

A power of two only moves the exponent: a dequantised value has the few mantissa bits of its code,
and float32 and bfloat16 hold it without rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.quant import FP4_VALUES, e2m1_codes, e8m0, power_of_two
from weft.runtime.checkpoint.layout import FP4_GROUP, FP8_BLOCK, ceil_div

# Largest value of each format as mantissa (of frexp, in [0.5, 1)) and exponent: 448 and 6.
_FP8_MAX = (0.875, 9)
_FP4_MAX = (0.75, 3)
_E8M0_BIAS = 127
# Dequantising goes by a few rows at a time, so that temporaries stay in the cache: several times as fast
# as whole matrices, and a matrix needs no memory beyond its result.
_FP4_ROWS = 128


@dataclass(frozen=True)
class Quantised:
    """A matrix of `shape` [O, I] as the files hold it: codes e4m3 [O, I], or int8 [O, ceil(I/2)] with two e2m1 in
    a byte; and its scales."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @property
    def is_fp4(self) -> bool:
        return self.codes.dtype == torch.int8

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[O, I] float32 or bfloat16, which hold every value exactly."""
        if self.is_fp4:
            return dequantise_fp4(self.codes, self.scale, self.shape[1], dtype)
        return dequantise_fp8(self.codes, self.scale, dtype)


def as_e8m0(scale: Tensor) -> Tensor | None:
    """Scales in E8M0 (float32 ones of Hugging Face's files too), or None if one is no power of two."""
    if scale.dtype == torch.float8_e8m0fnu:
        return scale
    out = scale.to(torch.float32).to(torch.float8_e8m0fnu)
    return out if torch.equal(out.to(torch.float32), scale.to(torch.float32)) else None


def dequantise_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 [O, I] and scale [ceil(O/128), ceil(I/128)] (e8m0 or float32) -> [O, I] of `dtype`."""
    assert weight.dtype == torch.float8_e4m3fn and weight.dim() == 2, weight.dtype
    rows, columns = weight.shape
    assert scale.shape == (ceil_div(rows, FP8_BLOCK), ceil_div(columns, FP8_BLOCK)), scale.shape
    out = torch.empty(rows, columns, dtype=dtype)
    table = _fp8_table()
    per_column = scale.to(torch.float32).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    for target, codes, scales in zip(out.split(FP8_BLOCK), weight.split(FP8_BLOCK), per_column, strict=True):
        target.copy_(_look_up(table, codes).mul_(scales))
    return out


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [O, I] -> e4m3 [O, I] and e8m0 scale [ceil(O/128), ceil(I/128)].

    The scale of a block is the smallest power of two with amax / scale <= 448, and 1 for a block of
    zeros; values are rounded to the nearest e4m3 number, ties to even. The input must be finite.
    """
    rows, columns = weight.shape
    row_blocks, column_blocks = ceil_div(rows, FP8_BLOCK), ceil_div(columns, FP8_BLOCK)
    fill = (0, column_blocks * FP8_BLOCK - columns, 0, row_blocks * FP8_BLOCK - rows)
    padded = F.pad(weight.to(torch.float32), fill)
    blocks = padded.view(row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    exponent = _scale_exponent(blocks.abs().amax(dim=(1, 3)), _FP8_MAX)
    scaled = blocks * power_of_two(-exponent)[:, None, :, None]
    codes = scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
    return codes.contiguous(), e8m0(exponent)


def dequantise_fp4(packed: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """int8 [O, ceil(I/2)], scale [O, ceil(I/32)] (e8m0 or float32) -> [O, columns] of `dtype`."""
    assert packed.dtype == torch.int8 and packed.dim() == 2, packed.dtype
    rows = packed.shape[0]
    assert packed.shape[1] == ceil_div(columns, 2), packed.shape
    assert scale.shape == (rows, ceil_div(columns, FP4_GROUP)), scale.shape
    out = torch.empty(rows, columns, dtype=dtype)
    table = _fp4_table()
    chunks = zip(out.split(_FP4_ROWS), packed.split(_FP4_ROWS), scale.split(_FP4_ROWS), strict=True)
    for target, codes, scales in chunks:
        values = _look_up(table, codes).view(torch.bfloat16)[:, :columns].to(torch.float32)
        target.copy_(values.mul_(scales.to(torch.float32).repeat_interleave(FP4_GROUP, dim=1)[:, :columns]))
    return out


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [O, I], I even -> int8 [O, I/2] and e8m0 scale [O, ceil(I/32)].

    The scale of a group is the smallest power of two with amax / scale <= 6, and 1 for a group of
    zeros; values are rounded to the nearest e2m1 number, ties to even. The input must be finite.
    """
    rows, columns = weight.shape
    assert columns % 2 == 0, f"FP4 packs two columns in a byte, got {columns}"
    groups = ceil_div(columns, FP4_GROUP)
    padded = F.pad(weight.to(torch.float32), (0, groups * FP4_GROUP - columns))
    blocks = padded.view(rows, groups, FP4_GROUP)
    exponent = _scale_exponent(blocks.abs().amax(dim=2), _FP4_MAX)
    scaled = blocks * power_of_two(-exponent)[:, :, None]
    codes = e2m1_codes(scaled.view_as(padded)[:, :columns])
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), e8m0(exponent)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[byte] for every one-byte code [O, I], in the dtype of the table [256].

    On CPUs torch's own conversion from FP8 takes several times as long as this.
    """
    index = codes.view(torch.uint8).to(torch.int32).flatten()
    return table.index_select(0, index).view(codes.shape)


def _fp8_table() -> Tensor:
    """Value of every e4m3 byte, float32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def _fp4_table() -> Tensor:
    """The two values of every byte (low nibble, high nibble) in bfloat16, as one int32 [256]."""
    values = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    values = torch.cat([values, -values])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int32).flatten()


def _scale_exponent(amax: Tensor, largest: tuple[float, int]) -> Tensor:
    """Smallest s with amax <= largest * 2^s (int32, within E8M0); 0 where amax is 0.

    Done on mantissas and exponents: a float log2 misjudges values next to a power of two.
    """
    assert bool(torch.isfinite(amax).all()), "only finite weights can be quantised"
    mantissa, exponent = torch.frexp(amax)
    top, top_exponent = largest
    result = exponent - top_exponent + (mantissa > top).to(torch.int32)
    return torch.where(amax == 0, 0, result).clamp(-_E8M0_BIAS, _E8M0_BIAS)
