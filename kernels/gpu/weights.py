"""Weights as the linears' kernels read them: rows of codes, with a scale per row and 128 columns, or plain floats.

Released FP8 weights have one scale per block of 128 x 128. Here every row has its own, so that rows of several
weights lie in one (projections of the same input are one product), whatever their number: 1/128 byte a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
# Counters of arrivals that one weight needs at most: tiles of its rows times tiles of tokens whose sums are split.
LOCKS = 4096


def locks(device: torch.device) -> Tensor:
    """[LOCKS] int32 zeros: the programs that share an output tile count themselves here, and the last one sets its
    counter back. So a weight is in one launch at a time."""
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Fp8Weight:
    """codes: [N, K] float8_e4m3fn, contiguous. scales: [ceil(K / 128), N] uint8, exponents plus 127 (E8M0): value
    (n, k) is codes[n, k] * 2^(scales[k // 128, n] - 127), but byte 0 is a scale of 0. locks: see `locks`."""

    codes: Tensor
    scales: Tensor
    locks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


@dataclass(frozen=True)
class FloatWeight:
    """weight: [N, K] bfloat16 or float32, contiguous. locks: see `locks`."""

    weight: Tensor
    locks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @classmethod
    def of(cls, *parts: Tensor) -> FloatWeight:
        """The rows of several tensors, in one."""
        weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
        return cls(weight, locks(weight.device))


def pack_fp8(parts: Sequence[tuple[Tensor, Tensor]]) -> Fp8Weight:
    """The rows of several released weights in one, all of the same K; values do not change.

    A part: codes [N, K] float8_e4m3fn, scale [ceil(N / 128), ceil(K / 128)] float8_e8m0fnu or its bytes.
    """
    codes = [part.view(torch.uint8) for part, _ in parts]
    scales = [
        scale.view(torch.uint8).repeat_interleave(GROUP, 0)[: len(part)]
        for part, (_, scale) in zip(codes, parts, strict=True)
    ]
    for part, scale in zip(codes, scales, strict=True):
        assert scale.shape == (len(part), -(-part.shape[1] // GROUP)), (part.shape, scale.shape)
    whole = (codes[0] if len(codes) == 1 else torch.cat(codes)).contiguous()
    return Fp8Weight(whole.view(torch.float8_e4m3fn), torch.cat(scales).t().contiguous(), locks(whole.device))
