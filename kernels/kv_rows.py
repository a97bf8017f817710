"""How KV rows and indexer keys are stored: dense, or paged in the byte layouts the GPU kernels read.

A row is addressed by its number; rows of a page are consecutive. Row 0 is the null row: zeros, never stored.
What the bytes of a page mean is said once, in `kernels/layouts.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from weft.kernels.layouts import CODE_MAX, SCALE_BYTES, RowLayout
from weft.kernels.quant import e2m1_codes, e2m1_values, e8m0, power_of_two

# The least e4m3 scale: a smaller one would be 0.
_LEAST_E4M3 = 2.0**-9


class Rows(Protocol):
    """A pool of rows of one width."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def gather(self, index: Tensor) -> Tensor:
        """[N] int64 row numbers -> [N, d] float32."""

    def store(self, index: Tensor, values: Tensor) -> None:
        """Write values [N, d] float32, rounded to the format, to rows index [N] int64 (no duplicates)."""

    def copy_pages(self, source: Tensor, target: Tensor, page: int) -> int:
        """Copy pages of `page` rows; source, target: [n] int64 page numbers. Returns how many bytes they are."""


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

    def copy_pages(self, source: Tensor, target: Tensor, page: int) -> int:
        pages = self.tensor.view(-1, page, self.tensor.shape[1])
        pages[target] = pages[source]
        return len(source) * pages[0].nbytes


class PagedRows:
    """uint8 pages [pages, layout.page_bytes] on a device: what the ops of `kernels/gpu` call `Paged`.

    Quantising is written for CPUs; on a GPU the ops store and read.
    """

    def __init__(self, pages: int, layout: RowLayout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.bytes = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device=device)
        page, at = layout.page, layout.scales_at
        self._data = self.bytes[:, :at].unflatten(1, (page, layout.data_bytes))
        scales = self.bytes[:, at : at + page * layout.scale_bytes]
        self._scales = scales.unflatten(1, (page, layout.scale_bytes))

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes

    def gather(self, index: Tensor) -> Tensor:
        layout = self.layout
        page, row = index // layout.page, index % layout.page
        data = self._data[page, row]
        scales = scale_values(self._scales[page, row], layout)
        coded = code_values(data[:, : layout.coded_bytes], layout)
        coded = coded * scales.repeat_interleave(layout.group, dim=1)[:, : layout.coded]
        if not layout.plain:
            return coded
        plain = data[:, layout.coded_bytes :].contiguous().view(torch.bfloat16).float()
        return torch.cat((coded, plain), 1)

    def store(self, index: Tensor, values: Tensor) -> None:
        layout = self.layout
        page, row = index // layout.page, index % layout.page
        codes, scales = quantise(values[:, : layout.coded], layout)
        if layout.plain:
            plain = values[:, layout.coded :].to(torch.bfloat16).view(torch.uint8)
            codes = torch.cat((codes, plain), 1)
        self._data[page, row] = codes
        fill = layout.scale_bytes - scales.shape[1]
        self._scales[page, row] = torch.nn.functional.pad(scales, (0, fill)) if fill else scales

    def copy_pages(self, source: Tensor, target: Tensor, page: int) -> int:
        assert page == self.layout.page
        self.bytes[target] = self.bytes[source]
        return len(source) * self.layout.page_bytes


def quantise(values: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """The codes and scales of a row's coded channels: [N, coded] float32 -> [N, coded_bytes] and [N, bytes of the
    groups' scales], uint8. Two e2m1 codes share a byte, the even channel in its low half."""
    fill = layout.groups * layout.group - layout.coded
    padded = torch.nn.functional.pad(values, (0, fill)) if fill else values
    grouped = padded.unflatten(1, (layout.groups, layout.group))
    top = CODE_MAX[layout.codes]
    scale, stored = _scale(grouped.abs().amax(2).clamp_min(layout.least) / top, layout)
    scaled = (grouped / scale[:, :, None]).flatten(1)[:, : layout.coded]
    if layout.codes == "e4m3":
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), stored
    codes = e2m1_codes(scaled.clamp(-top, top))
    return codes[:, 0::2] | (codes[:, 1::2] << 4), stored


def _scale(ratio: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """[N, groups] of what a group's largest code must stand for -> scales in float32, and as bytes."""
    if layout.scales == "float32":
        return ratio, ratio.contiguous().view(torch.uint8)
    if layout.scales == "e8m0":
        exponent = scale_exponent(ratio)
        return power_of_two(exponent), e8m0(exponent).view(torch.uint8)
    narrow = ratio.clamp(_LEAST_E4M3, CODE_MAX["e4m3"]).to(torch.float8_e4m3fn)
    return narrow.float(), narrow.view(torch.uint8)


def code_values(data: Tensor, layout: RowLayout) -> Tensor:
    """[N, coded_bytes] uint8 -> [N, coded] float32, unscaled."""
    if layout.codes == "e4m3":
        return e4m3_values(data)
    return e2m1_values(torch.stack((data & 15, data >> 4), 2).flatten(1))


def scale_values(data: Tensor, layout: RowLayout) -> Tensor:
    """[N, scale_bytes] uint8 -> [N, groups] float32."""
    own = data[:, : layout.groups * SCALE_BYTES[layout.scales]].contiguous()
    if layout.scales == "float32":
        return own.view(torch.float32)
    return e8m0_values(own) if layout.scales == "e8m0" else e4m3_values(own)


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
