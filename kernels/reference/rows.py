"""Packing and unpacking rows of any `RowLayout`, in plain torch: what the kernels' bytes are compared with.

Scales by format, of a group whose largest magnitude is m = max(amax, layout.least):
- e8m0: 2^ceil(log2(m / largest code)), stored with bias 127; byte 0 reads as 0, so that a null row is zeros;
- float32: m / largest code, rounded;
- e4m3: m / largest code rounded to nearest e4m3 (2^-9 at least); values beyond the largest code saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import CODE_MAX, RowLayout

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
# Between two codes, for rounding to nearest; at a middle the even code wins.
_MIDDLES = (_E2M1[1:] + _E2M1[:-1]) / 2
_LEAST_E4M3 = 2.0**-9


def pack(values: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """values [N, channels] -> data [N, data_bytes], scales [N, scale_bytes], both uint8."""
    assert values.shape[1] == layout.channels
    scales, stored = _scales(values, layout)
    coded = _grouped(values.double(), layout)
    if layout.scales == "e8m0":
        scaled = coded / scales[:, :, None]
    else:  # a float32 division, by definition: a quotient next to a middle may round to it
        scaled = (coded.float() / scales.float()[:, :, None]).double()
    scaled = scaled.flatten(1)[:, : layout.coded]
    plain = values[:, layout.coded :].to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat((_codes(scaled, layout), plain.reshape(len(values), 2 * layout.plain)), 1), stored


def unpack(data: Tensor, scales: Tensor, layout: RowLayout) -> Tensor:
    """The inverse: [N, channels] float64."""
    coded = data[:, : layout.coded_bytes]
    if layout.codes == "e2m1":
        nibbles = torch.stack((coded & 15, coded >> 4), 2).flatten(1).long()
        values = _E2M1.to(data.device)[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    else:
        values = coded.contiguous().view(torch.float8_e4m3fn).double()
    factors = _stored_scales(scales, layout).repeat_interleave(layout.group, 1)[:, : layout.coded]
    plain = data[:, layout.coded_bytes :].contiguous().view(torch.bfloat16).double()
    return torch.cat((values * factors, plain), 1)


def store(pool: Paged, rows: Tensor, values: Tensor) -> None:
    """values [N, channels] into rows [N] of the pool, -1 to nowhere. The other bytes stay."""
    keep = rows >= 0
    page, place = _place(rows[keep], pool.layout)
    data, scales = _parts(pool)
    data[page, place], scales[page, place] = pack(values[keep], pool.layout)


def gather(pool: Paged, rows: Tensor) -> Tensor:
    """Rows [N] of the pool -> [N, channels] float64, zeros for -1."""
    page, place = _place(rows.clamp_min(0), pool.layout)
    data, scales = _parts(pool)
    out = unpack(data[page, place], scales[page, place], pool.layout)
    return torch.where(rows[:, None] >= 0, out, 0.0)


def error_bound(values: Tensor, layout: RowLayout) -> Tensor:
    """[N, channels] how far `unpack(pack(values))` may be from `values`, by the formats alone.

    e4m3 keeps 3 bits behind the leading one: half a step is 2^-4 of a normal value, and 2^-10 of the scale below
    2^-6 of it. e2m1: half a step is at most 1/3 of a value of 0.25 and more (the middle of 0.5 and 1), else 1/4
    of the scale; a scale rounded down by 2^-4 saturates at 1/16 less. bfloat16 keeps 7 bits: 2^-8.
    """
    values = values.double()
    scales = _scales(values, layout)[0].repeat_interleave(layout.group, 1)[:, : layout.coded]
    size = values[:, : layout.coded].abs()
    if layout.codes == "e4m3":
        coded = torch.maximum(size * 2.0**-4, scales * 2.0**-10)
    else:
        coded = torch.maximum(size / 3, scales / 4)
    return torch.cat((coded * (1 + 2.0**-20), values[:, layout.coded :].abs() * 2.0**-8), 1)


def _grouped(values: Tensor, layout: RowLayout) -> Tensor:
    """The coded channels as [N, groups, group], zeros behind the last."""
    fill = layout.groups * layout.group - layout.coded
    coded: Tensor = pad(values[:, : layout.coded], (0, fill))
    return coded.reshape(len(values), layout.groups, layout.group)


def _scales(values: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Scales [N, groups] float64, and their bytes with padding [N, scale_bytes]."""
    top = _grouped(values.double(), layout).abs().amax(2).clamp_min(layout.least)
    largest = CODE_MAX[layout.codes]
    if layout.scales == "e8m0":
        mantissa, exponent = torch.frexp(top)
        of_code, code_exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
        exponent = exponent - int(code_exponent) + (mantissa > float(of_code)).int()
        scales, stored = torch.ldexp(torch.ones_like(top), exponent), (exponent + 127).to(torch.uint8)
    elif layout.scales == "float32":
        ratio = top.float() / largest
        scales, stored = ratio.double(), ratio.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    else:
        code = (top.float() / largest).clamp(_LEAST_E4M3, 448.0).to(torch.float8_e4m3fn)
        scales, stored = code.double(), code.view(torch.uint8)
    return scales, pad(stored, (0, layout.scale_bytes - stored.shape[1]))


def _stored_scales(stored: Tensor, layout: RowLayout) -> Tensor:
    """The inverse of `_scales`' bytes: [N, groups] float64."""
    if layout.scales == "float32":
        return stored[:, : 4 * layout.groups].contiguous().view(torch.float32).double()
    stored = stored[:, : layout.groups]
    if layout.scales == "e4m3":
        return stored.contiguous().view(torch.float8_e4m3fn).double()
    power = torch.ldexp(torch.ones(stored.shape, dtype=torch.float64, device=stored.device), stored.int() - 127)
    return torch.where(stored == 0, 0.0, power)


def _codes(scaled: Tensor, layout: RowLayout) -> Tensor:
    """Values over their scale [N, coded] -> [N, coded_bytes] uint8, the even channel in the low nibble."""
    if layout.codes == "e4m3":
        return scaled.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    size = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for index, middle in enumerate(_MIDDLES.tolist()):
        code += (size >= middle if index % 2 else size > middle).to(torch.uint8)
    code |= torch.signbit(scaled).to(torch.uint8) << 3
    return code[:, 0::2] | (code[:, 1::2] << 4)


def _parts(pool: Paged) -> tuple[Tensor, Tensor]:
    """Views of a pool's data [pages, page, data_bytes] and scales [pages, page, scale_bytes]."""
    layout = pool.layout
    data = pool.bytes[:, : layout.scales_at].unflatten(1, (layout.page, layout.data_bytes))
    end = layout.scales_at + layout.page * layout.scale_bytes
    return data, pool.bytes[:, layout.scales_at : end].unflatten(1, (layout.page, layout.scale_bytes))


def _place(rows: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    rows = rows.long()
    return rows // layout.page, rows % layout.page
