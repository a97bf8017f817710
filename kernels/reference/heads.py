"""Norm and RoPE by their definitions, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged, Pages
from weft.kernels.layouts import kv_fp8
from weft.kernels.reference.rows import store


def norm_rope_store(
    q: Tensor, kv: Tensor, kv_weight: Tensor, cos_sin: Tensor, rows: Tensor, pool: Paged, eps: float
) -> Tensor:
    """See `weft.kernels.gpu.heads.norm_rope_store`; float64."""
    store(pool, rows, rotate(rms_norm(kv.double(), kv_weight, eps), cos_sin))
    return rotate(rms_norm(q.double(), None, eps), cos_sin)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., d] float64 * rsqrt(mean x^2 + eps) * weight."""
    out = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight.double()


def rotate(x: Tensor, cos_sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Turn the pairs (2i, 2i+1) of the last rope channels of x [T, d] or [T, H, d] by cos_sin [T, rope]."""
    rope = cos_sin.shape[1]
    cos, sin = cos_sin.double().chunk(2, 1)
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    if inverse:
        sin = -sin
    pairs = x[..., x.shape[-1] - rope :].unflatten(-1, (rope // 2, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[..., : x.shape[-1] - rope], turned), -1)


def angles(positions: Tensor, rope: int, theta: float = 1e4) -> Tensor:
    """cos_sin [T, rope] float32 of positions [T]."""
    exponent = torch.arange(0, rope, 2, dtype=torch.float64, device=positions.device) / rope
    angle = positions.double()[:, None] / theta**exponent
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def example(tokens: int, device: str, *, heads: int = 64, page: int = 64) -> dict[str, Any]:
    """Arguments of `norm_rope_store` at V4-Flash's sizes; each token is of another sequence."""
    layout = kv_fp8(page, 448, 64)
    order = torch.randperm(tokens + page, device=device)[:tokens].int() + page
    return {
        "q": torch.randn(tokens, heads, 512, device=device).bfloat16(),
        "kv": torch.randn(tokens, 512, device=device).bfloat16(),
        "kv_weight": torch.rand(512, device=device) + 0.5,
        "cos_sin": angles(torch.randint(0, 100_000, (tokens,), device=device), 64),
        "rows": order,
        "pool": Pages.empty(-(-tokens // page) + 2, layout, device),
        "eps": 1e-6,
    }
