"""Linears on device tensors: the op that fits how a weight is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.linear import fp8_linear, linear
from weft.kernels.gpu.weights import FloatWeight, Fp8Weight

Weight = Fp8Weight | FloatWeight
# The weight and the epsilon of an RMS norm of the input.
Norm = tuple[Tensor, float]


def project(
    x: Tensor, weight: Weight, *, norm: Norm | None = None, groups: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """x [T, K], or [T, G, K] for `groups` diagonal blocks -> [T, N] of `dtype`, by default x's."""
    if isinstance(weight, Fp8Weight):
        return fp8_linear(x, weight, norm=norm, groups=groups, dtype=dtype)
    return linear(x, weight, norm=norm, groups=groups, dtype=dtype)
