"""What norm and RoPE give in float64, and how far float32 may be from it."""

from __future__ import annotations

import torch
from torch import Tensor

from support.kernels import U32
from weft.kernels.layouts import RowLayout
from weft.kernels.reference.heads import rms_norm, rotate
from weft.kernels.reference.rows import error_bound


def normed_and_turned(
    x: Tensor, error: Tensor, weight: Tensor | None, cos_sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x [T, d] or [T, H, d] float64, known to within `error` -> the result, and its bound in float32.

    The norm: a sum of d squares in blocks of at most 16 and then a tree (under 32 roundings, halved by the root),
    the scale, the weight, and what the error of x makes of the scale, at most |x| |error| / |x|^2. The rotation:
    each of a pair's two channels gets products and a sum, 3 roundings each, of the errors of both.
    """
    exact = rms_norm(x, weight, eps)
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    width = 1.0 if weight is None else weight.double().abs()
    relative = 32 * U32 + error.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    bound = error * scale * width + exact.abs() * relative
    rope = cos_sin.shape[1]
    turning = (bound + 4 * U32 * exact.abs())[..., x.shape[-1] - rope :].unflatten(-1, (rope // 2, 2)).sum(-1)
    bound = torch.cat((bound[..., : x.shape[-1] - rope], turning.repeat_interleave(2, -1)), -1)
    return rotate(exact, cos_sin), bound


def stored_bound(exact: Tensor, error: Tensor, layout: RowLayout) -> Tensor:
    """How far a stored row may be from `exact` [N, channels], float64, if it was known to within `error`.

    That error, and the format's own of the largest values it may have had: their scale may be the next power.
    """
    return error_bound(exact.abs() + error, layout) + error
