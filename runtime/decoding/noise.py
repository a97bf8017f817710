"""Noise that depends on (seed, position, purpose, token id) and on nothing else.

A token drawn with it is the same in any batch, at any speculative depth, after a resume. The generator is
SplitMix64's finaliser over a counter (Steele, Lea and Flood, 2014), in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Purposes: of the token that counts; in fast mode of a draft, and of whether it is accepted.
SAMPLE, DRAFT, ACCEPT = range(3)

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, position: int, purpose: int = SAMPLE) -> int:
    """A 64-bit key, as a signed integer."""
    key = _finalise((seed + _GOLDEN) & _MASK)
    key = _finalise((key ^ position) + _GOLDEN & _MASK)
    return _signed(_finalise((key ^ purpose) + _GOLDEN & _MASK))


def gumbel(keys: Tensor, width: int) -> Tensor:
    """keys: [B] int64 -> [B, width] float64 standard Gumbel noise."""
    return -torch.log(-torch.log(uniform(keys, width)))


def uniform(keys: Tensor, width: int) -> Tensor:
    """keys: [B] int64 -> [B, width] float64 between 0 and 1, never one of the two."""
    counter = torch.arange(1, width + 1) * _signed(_GOLDEN)
    x = keys[:, None] + counter
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift(x, 31)
    # 52 bits and a half fit a double; 53 and a half would round to 1 at the top, and the noise be infinite.
    return (_shift(x, 12).double() + 0.5) * 2.0**-52


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
