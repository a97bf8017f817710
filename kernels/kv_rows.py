"""How KV rows and indexer keys are stored: dense, or paged in the byte layouts the GPU kernels read.

A row is addressed by its number; rows of a page are consecutive. Row 0 is the null row: zeros, never stored.
The FP8 and FP4 page layouts are the public ones of FlashMLA and DeepGEMM for DeepSeek-V4: all data of a page
first, then all scales. At V4's sizes a KV row takes 448 + 128 + 8 = 584 bytes, an indexer key 132 (FP8) or 68
(FP4).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from weft.kernels.quant import FP4_GROUP, FP4_MAX, FP8_GROUP, FP8_MAX, e2m1_codes, e2m1_values, e8m0, power_of_two


class Rows(Protocol):
    """A pool of rows of one width."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def gather(self, index: Tensor) -> Tensor:
        """[N] int64 row numbers -> [N, d] float32."""

    def store(self, index: Tensor, values: Tensor) -> None:
        """Write values [N, d] float32, rounded to the format, to rows index [N] int64 (no duplicates)."""

    def copy_page(self, source: int, target: int, page: int) -> int:
        """Copy `page` rows; source and target are the first row of a page. Returns how many bytes they are."""


class DenseRows:
    """One tensor [rows, d] of float32 or bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def gather(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(0, index).float()

    def store(self, index: Tensor, values: Tensor) -> None:
        self.tensor.index_copy_(0, index, values.to(self.tensor.dtype))

    def copy_page(self, source: int, target: int, page: int) -> int:
        rows = self.tensor[source : source + page]
        self.tensor[target : target + page] = rows
        return rows.nbytes


class _Pages:
    """uint8 pages of `page` rows: data_bytes per row, then scale_bytes per row, padded to `multiple` bytes."""

    def __init__(self, pages: int, page: int, data_bytes: int, scale_bytes: int, multiple: int = 1) -> None:
        size = math.ceil(page * (data_bytes + scale_bytes) / multiple) * multiple
        self.page = page
        self.bytes = torch.zeros(pages, size, dtype=torch.uint8)
        self.data = self.bytes[:, : page * data_bytes].unflatten(1, (page, data_bytes))
        scales = self.bytes[:, page * data_bytes : page * (data_bytes + scale_bytes)]
        self.scales = scales.unflatten(1, (page, scale_bytes))

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        page, row = index // self.page, index % self.page
        return self.data[page, row], self.scales[page, row]

    def write(self, index: Tensor, data: Tensor, scales: Tensor) -> None:
        page, row = index // self.page, index % self.page
        self.data[page, row] = data
        self.scales[page, row] = scales

    def copy_page(self, source: int, target: int, page: int) -> int:
        assert page == self.page
        self.bytes[target // page] = self.bytes[source // page]
        return self.bytes[0].nbytes


class Fp8KvRows(_Pages):
    """KV rows: e4m3 non-RoPE channels with one power-of-two scale per 64, bfloat16 RoPE channels.

    Scale 2^ceil(log2(max(amax, 1e-4) / 448)) as a biased byte, padded to a multiple of 8 bytes per row; a page is
    padded to a multiple of the row's data, as FlashMLA's address arithmetic wants it.
    """

    def __init__(self, pages: int, page: int, nope: int, rope: int) -> None:
        self.nope = nope
        self.groups = math.ceil(nope / FP8_GROUP)
        data = nope + 2 * rope
        super().__init__(pages, page, data, math.ceil(self.groups / 8) * 8, multiple=data)

    def gather(self, index: Tensor) -> Tensor:
        data, scales = self.read(index)
        factor = e8m0_values(scales[:, : self.groups]).repeat_interleave(FP8_GROUP, dim=1)[:, : self.nope]
        nope = e4m3_values(data[:, : self.nope]) * factor
        return torch.cat((nope, data[:, self.nope :].contiguous().view(torch.bfloat16).float()), 1)

    def store(self, index: Tensor, values: Tensor) -> None:
        fill = self.groups * FP8_GROUP - self.nope
        grouped = torch.nn.functional.pad(values[:, : self.nope], (0, fill)).unflatten(1, (self.groups, FP8_GROUP))
        exponent = scale_exponent(grouped.abs().amax(2).clamp_min(1e-4) / FP8_MAX)
        codes = (grouped / power_of_two(exponent)[:, :, None]).to(torch.float8_e4m3fn).flatten(1)
        rope = values[:, self.nope :].to(torch.bfloat16).view(torch.uint8)
        scales = torch.zeros(len(index), self.scales.shape[2], dtype=torch.uint8)
        scales[:, : self.groups] = e8m0(exponent).view(torch.uint8)
        self.write(index, torch.cat((codes[:, : self.nope].view(torch.uint8), rope), 1), scales)


class Fp8Keys(_Pages):
    """Indexer keys: e4m3 with one float32 scale per key, amax / 448."""

    def __init__(self, pages: int, page: int, dim: int) -> None:
        super().__init__(pages, page, dim, 4)

    def gather(self, index: Tensor) -> Tensor:
        data, scales = self.read(index)
        return e4m3_values(data) * scales.contiguous().view(torch.float32)

    def store(self, index: Tensor, values: Tensor) -> None:
        scale = values.abs().amax(1, keepdim=True).clamp_min(1e-4) / FP8_MAX
        codes = (values / scale).to(torch.float8_e4m3fn)
        self.write(index, codes.view(torch.uint8), scale.view(torch.uint8))


class Fp4Keys(_Pages):
    """Indexer keys: e2m1, even channel in the low nibble, one power-of-two scale per 32 channels."""

    def __init__(self, pages: int, page: int, dim: int) -> None:
        self.group = min(FP4_GROUP, dim)
        super().__init__(pages, page, dim // 2, dim // self.group)

    def gather(self, index: Tensor) -> Tensor:
        data, scales = self.read(index)
        pairs = torch.stack((data & 15, data >> 4), 2).flatten(1)
        return e2m1_values(pairs) * e8m0_values(scales).repeat_interleave(self.group, dim=1)

    def store(self, index: Tensor, values: Tensor) -> None:
        grouped = values.unflatten(1, (-1, self.group))
        exponent = scale_exponent(grouped.abs().amax(2).clamp_min(FP4_MAX * 2.0**-126) / FP4_MAX)
        codes = e2m1_codes((grouped / power_of_two(exponent)[:, :, None]).flatten(1))
        self.write(index, codes[:, 0::2] | (codes[:, 1::2] << 4), e8m0(exponent).view(torch.uint8))


def scale_exponent(ratio: Tensor) -> Tensor:
    """ceil(log2(ratio)) for positive float32 ratio, exactly."""
    mantissa, exponent = torch.frexp(ratio)
    return exponent - (mantissa == 0.5).int()


def e4m3_values(codes: Tensor) -> Tensor:
    """uint8 e4m3 codes -> float32; a table is several times faster than torch's conversion on CPUs."""
    return _E4M3[codes.long()]


def e8m0_values(codes: Tensor) -> Tensor:
    """uint8 E8M0 codes -> float32 powers of two; 0 (never written) gives 0, so that the null row is zeros."""
    return _E8M0[codes.long()]


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_E8M0 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
_E8M0[0] = 0.0
