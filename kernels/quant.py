"""Simulation of the released model's quantised activations: values are rounded, not stored packed.

KV rows: FP8 e4m3 on the non-RoPE channels, one power-of-two scale per 64. Indexer q and k: a normalised
Hadamard rotation, then FP4 e2m1, one power-of-two scale per 32 (DeepSeek-V4's published inference code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_GROUP = 64
FP4_GROUP = 32


def power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive float32 x, by its exponent bits: exact where log2 may round."""
    mantissa, exponent = torch.frexp(x)
    exponent = exponent - (mantissa == 0.5).int()
    power: Tensor = torch.ldexp(torch.ones_like(x), exponent)
    return power


def simulate_fp8_(x: Tensor, width: int) -> Tensor:
    """Round the first `width` channels of x [T, d] float32 to e4m3 in place, scaled per 64 channels."""
    for start in range(0, width, FP8_GROUP):
        group = x[:, start : min(start + FP8_GROUP, width)]
        scale = power_of_two_at_least(group.abs().amax(1, keepdim=True).clamp_min(1e-4) / FP8_MAX)
        group.copy_((group / scale).to(torch.float8_e4m3fn).float() * scale)
    return x


def simulate_fp4(x: Tensor) -> Tensor:
    """Round x [..., d] float32 to e2m1, scaled per 32 channels (fewer when d is)."""
    group = x.unflatten(-1, (-1, min(FP4_GROUP, x.shape[-1])))
    top = group.abs().amax(-1, keepdim=True).clamp_min(FP4_MAX * 2.0**-126)
    scale = power_of_two_at_least(top / FP4_MAX)
    return (round_e2m1(group / scale) * scale).flatten(-2)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign, ties to the even code."""
    magnitude: Tensor = x.abs().clamp_max(FP4_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix over sqrt(size): [size, size] float32, symmetric and orthogonal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)
