"""Simulation of the released model's quantised activations: values are rounded, not stored packed.

KV rows: FP8 e4m3 on the non-RoPE channels, one power-of-two scale per 64. Indexer q and k: a normalised
Hadamard rotation, then FP4 e2m1, one power-of-two scale per 32 (DeepSeek-V4's published inference code).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_GROUP = 64
FP4_GROUP = 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, by its bits: `torch.ldexp` goes through pow, which may round."""
    return e8m0(exponent).to(torch.float32)


def e8m0(exponent: Tensor) -> Tensor:
    """Exponents in -127..127 as E8M0 bytes: byte b is 2^(b - 127)."""
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive float32 x, by its exponent: exact where log2 may round."""
    mantissa, exponent = torch.frexp(x)
    return power_of_two(exponent - (mantissa == 0.5).int())


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
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign, ties to the even code; beyond 6 gives 6."""
    return e2m1_values(e2m1_codes(x.clamp(-FP4_MAX, FP4_MAX)))


def e2m1_values(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 -> float32."""
    return _E2M1[codes.long()]


def e2m1_codes(x: Tensor) -> Tensor:
    """float32 within [-6, 6] -> codes, uint8. At a midpoint the code without the odd bit wins."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for index, (low, high) in enumerate(pairwise(FP4_VALUES)):
        middle = (low + high) / 2
        code += size >= middle if index % 2 else size > middle
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix over sqrt(size): [size, size] float32, symmetric and orthogonal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


_POSITIVE = torch.tensor(FP4_VALUES)
_E2M1 = torch.cat((_POSITIVE, -_POSITIVE))
