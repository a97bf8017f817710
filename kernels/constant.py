"""Numbers as 0-dim arrays: numpy converts a Python number or a numpy scalar in every call, for as long again."""

from __future__ import annotations

from functools import cache

import numpy as np

from weft.kernels.linear import Array


@cache
def constant(value: float) -> Array:
    """A float32 0-dim array, shared: never modify it."""
    return np.array(value, np.float32)
