"""Elementwise functions whose result does not depend on where an element lies in its tensor.

`torch.sigmoid`, `silu` and `softplus` use other code for the last few elements than for full vectors, so the same
number can give other bits (measured on AVX-512). `exp`, `log1p`, `sqrt` and arithmetic do not; everything here is
written with those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.constant import constant


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); float32 in, float32 out."""
    return torch.exp(-x).add_(constant(1.0)).reciprocal_()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow."""
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


def sqrt_softplus(x: Tensor) -> Tensor:
    """The V4 router's scoring function."""
    return torch.sqrt(softplus(x))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in float32.

    gate, up: [T, I] of any float dtype -> [T, I] float32.
    """
    gate = gate.float().clamp_max(limit)
    return gate * sigmoid(gate) * up.float().clamp(-limit, limit)
