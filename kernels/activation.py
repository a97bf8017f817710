"""Elementwise functions whose result does not depend on where an element lies in its tensor.

`torch.sigmoid`, `silu` and `softplus` use other code for the last few elements than for full vectors, so the same
number can give other bits (measured on AVX-512). numpy's `exp`, `logaddexp`, `sqrt` and arithmetic do not;
everything here is written with those.
"""

from __future__ import annotations

import numpy as np

from weft.kernels.constant import constant
from weft.kernels.linear import Array

# exp of more would overflow, which numpy warns of; 1 / (1 + exp) is below the least normal number from here on.
_LARGEST = 88.0


def sigmoid_(minus: Array, top: Array) -> Array:
    """top * sigmoid(-minus), in the place of minus."""
    np.minimum(minus, constant(_LARGEST), out=minus)
    np.exp(minus, minus)
    minus += constant(1.0)
    return np.divide(top, minus, minus)


def sqrt_softplus(x: Array) -> Array:
    """The V4 router's scoring function: the root of log(1 + exp(x)), without overflow."""
    out = np.logaddexp(x, constant(0.0))
    return np.sqrt(out, out)


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clamp(up, -limit, limit): [T, I] each, float32."""
    gate = np.minimum(gate, constant(limit))
    up = np.minimum(up, constant(limit))
    np.maximum(up, constant(-limit), out=up)
    up *= sigmoid_(-gate, gate)
    return up
