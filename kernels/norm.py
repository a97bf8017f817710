"""RMS normalisation over the last dimension, in float32.

In numpy, whose calls cost a few rows a third of torch's. `vecdot` takes rows one by one: none can depend on the
others, or on how many there are.
"""

from __future__ import annotations

import numpy as np

from weft.kernels.constant import constant
from weft.kernels.linear import Array


def inverse_rms(x: Array, eps: float) -> Array:
    """1 / sqrt(mean(x^2) + eps): [..., D] -> [..., 1]."""
    square: Array = np.vecdot(x, x)[..., None]
    square *= constant(1 / x.shape[-1])
    square += constant(eps)
    np.sqrt(square, square)
    return np.divide(constant(1.0), square, square)


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x * rsqrt(mean(x^2) + eps) * weight: x [..., D], weight [D] or None."""
    out = x * inverse_rms(x, eps)
    if weight is not None:
        out *= weight
    return out
