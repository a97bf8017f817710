"""The inverse rotation of attention's output, and its quantisation, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels.layouts import RowLayout
from weft.kernels.reference.heads import angles, rotate
from weft.kernels.reference.rows import pack


def inverse_rope(o: Tensor, cos_sin: Tensor) -> Tensor:
    """See `weft.kernels.gpu.output.inverse_rope`."""
    return rotate(o.double(), cos_sin, inverse=True).to(o.dtype)


def inverse_rope_quant(o: Tensor, cos_sin: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.gpu.output.inverse_rope_quant`."""
    flat = rotate(o.double(), cos_sin, inverse=True).flatten(1)
    data, scales = pack(flat, RowLayout(1, flat.shape[1], 0, group))
    power = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return data.view(torch.float8_e4m3fn), power


def example(tokens: int, device: str, *, heads: int = 64) -> dict[str, Any]:
    """Arguments of both at V4-Flash's sizes."""
    return {
        "o": torch.randn(tokens, heads, 512, device=device).bfloat16(),
        "cos_sin": angles(torch.randint(0, 100_000, (tokens,), device=device), 64),
    }
