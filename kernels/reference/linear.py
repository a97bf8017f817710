"""Linears by their definition, in float64, and V4-Flash's for benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.kernels.gpu.weights import GROUP, FloatWeight, Fp8Weight, locks
from weft.kernels.reference.heads import rms_norm

_LEAST = 1e-4  # DeepSeek's: a group's scale fits at least this
Norm = tuple[Tensor, float] | None


def fp8_linear(x: Tensor, weight: Fp8Weight, norm: Norm) -> Tensor:
    """See `weft.kernels.gpu.linear.fp8_linear`; x: [T, G, K]. Returns [T, N] float64."""
    codes, scales = quantise_rows(x, norm)
    return product(values(codes, scales), weight_values(weight))


def linear(x: Tensor, weight: FloatWeight, norm: Norm) -> Tensor:
    """See `weft.kernels.gpu.linear.linear`; x: [T, G, K]. Returns [T, N] float64."""
    return product(normed(x, norm).to(weight.weight.dtype).double(), weight.weight.double())


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x [..., K], or its norm in the same type."""
    return x if norm is None else rms_norm(x.double(), *norm).to(x.dtype)


def quantise_rows(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K] e4m3, scales [..., ceil(K / 128)] uint8."""
    columns = x.shape[-1]
    grouped = pad(normed(x, norm).double(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    top = grouped.abs().amax(-1).float().clamp_min(_LEAST)
    mantissa, exponent = torch.frexp(top)
    exponent = exponent - 9 + (mantissa > 0.875).int()  # 448 is 0.875 * 2^9
    scaled = (grouped * torch.ldexp(torch.ones_like(grouped[..., 0]), -exponent)[..., None]).flatten(-2)
    codes = scaled[..., :columns].float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes, (exponent + 127).to(torch.uint8)


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [..., K], scales [..., ceil(K / 128)] -> float64."""
    power = torch.ldexp(torch.ones(scales.shape, dtype=torch.float64, device=scales.device), scales.int() - 127)
    power = torch.where(scales == 0, 0.0, power)
    return codes.float().double() * power.repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]


def weight_values(weight: Fp8Weight) -> Tensor:
    """[N, K] float64."""
    return values(weight.codes, weight.scales.t())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, G, K], weight [N, K], a group's rows in turn -> [T, N]."""
    grouped = weight.unflatten(0, (x.shape[1], -1))
    return torch.einsum("tgk,gnk->tgn", x, grouped).flatten(1)


class Shape(NamedTuple):
    """A linear of the model: a weight [rows, columns] in `groups` blocks, fp8 or bfloat16; with a norm or not."""

    rows: int
    columns: int
    groups: int = 1
    fp8: bool = True
    norm: bool = False
    dtype: torch.dtype = torch.bfloat16


# V4-Flash's, in the order of a layer.
FLASH = {
    "wq_a|wkv": Shape(1536, 4096),
    "wq_b": Shape(32768, 1024, norm=True),
    "wq_b|indexer.wq_b": Shape(40960, 1024, norm=True),
    "wo_a": Shape(8192, 4096, groups=8),
    "wo_b": Shape(4096, 8192),
    "compressor c4": Shape(2560, 4096, fp8=False, dtype=torch.float32),
    "compressor c128": Shape(1024, 4096, fp8=False, dtype=torch.float32),
    "head": Shape(129280, 4096, fp8=False, dtype=torch.float32),
}


def example(tokens: int, device: str, shape: Shape = FLASH["wq_a|wkv"]) -> dict[str, Any]:
    """Arguments of `fp8_linear` or `linear`. With a norm, x is a slice of wider rows, as the query's is."""
    x = torch.randn(tokens, shape.groups * shape.columns + (512 if shape.norm else 0), device=device).bfloat16()
    x = x[:, : shape.groups * shape.columns]
    norm = (torch.rand(shape.columns, device=device) + 0.5, 1e-6) if shape.norm else None
    return {
        "x": x if shape.groups == 1 else x.unflatten(1, (shape.groups, shape.columns)),
        "weight": (random_fp8 if shape.fp8 else random_float)(shape.rows, shape.columns, device),
        "norm": norm,
        "groups": shape.groups,
        "dtype": shape.dtype,
    }


def random_fp8(rows: int, columns: int, device: str) -> Fp8Weight:
    """Codes of all sizes, scales that differ from row to row and are near 2^-8."""
    codes = (torch.randn(rows, columns, device=device) * 60).to(torch.float8_e4m3fn)
    scales = torch.randint(117, 121, (-(-columns // GROUP), rows), dtype=torch.uint8, device=device)
    return Fp8Weight(codes, scales, locks(codes.device))


def random_float(rows: int, columns: int, device: str, dtype: torch.dtype = torch.bfloat16) -> FloatWeight:
    return FloatWeight.of((torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype))
