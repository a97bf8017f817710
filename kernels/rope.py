"""Partial interleaved RoPE with YaRN frequencies.

Only the last `rope_dim` channels rotate, in pairs (2i, 2i+1). Window layers and the MTP block use the plain
base; compressed layers use another base with YaRN. There is no attention scaling factor (DeepSeek-V4's
published code multiplies neither cos/sin nor the softmax scale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.linear import Array


def inverse_frequencies(
    rope_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """[rope_dim / 2] float32 angles per position. `factor` > 1 interpolates the slow pairs (YaRN)."""
    exponent = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    frequency = 1.0 / theta**exponent
    if factor == 1.0:
        return frequency
    low = max(math.floor(_pair_of(beta_fast, rope_dim, theta, original_length)), 0)
    high = min(math.ceil(_pair_of(beta_slow, rope_dim, theta, original_length)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    keep = 1.0 - ramp.clamp(0, 1)
    return frequency / factor * (1.0 - keep) + frequency * keep


def _pair_of(rotations: float, rope_dim: int, theta: float, length: int) -> float:
    """The pair index that turns `rotations` times over `length` positions."""
    return rope_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Rotation:
    """Unit complex numbers of some positions: [T, rope_dim / 2]."""

    unit: NDArray[np.complex64]

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor) -> Rotation:
        """positions: [T] int64; frequencies: [rope_dim / 2] float32."""
        angle = positions.float()[:, None] * frequencies
        return cls(torch.complex(torch.cos(angle), torch.sin(angle)).numpy())

    @property
    def inverse(self) -> Rotation:
        return Rotation(self.unit.conj())


def rotate_(x: Array, rotation: Rotation) -> Array:
    """Rotate the last rope_dim channels of x in place and return x.

    x: [T, d] or [T, H, d]; rotation of the same T positions. With two pairs or more numpy multiplies the pairs of
    one row at a time; a single pair's bits may depend on the number of rows.
    """
    unit = rotation.unit if x.ndim == 2 else rotation.unit[:, None]
    tail = x[..., -2 * unit.shape[-1] :].view(np.complex64)
    tail *= unit
    return x
