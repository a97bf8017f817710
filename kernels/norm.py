"""RMS normalisation over the last dimension, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.constant import constant


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x^2) + eps): [..., D] float32 -> [..., 1]."""
    # sum with a factor instead of mean: one call less, and mean is a slow one.
    return torch.add(constant(eps), (x * x).sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight.

    x: [..., D] of any float dtype; weight: [D] float32 or None. Computed in float32, returned in x's dtype.
    """
    wide = x.float()
    out = wide * inverse_rms(wide, eps)
    if weight is not None:
        out = out * weight
    return out.to(x.dtype)
