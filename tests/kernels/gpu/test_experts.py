"""Experts against float64, for every format of weights, and the order that prefill takes pairs in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernels import U16, U32, assert_within, gamma, same_bits
from weft.kernels.gpu.expert_weights import Experts, FloatExperts
from weft.kernels.gpu.experts import (
    close_experts,
    open_experts,
    run_experts,
)
from weft.kernels.reference import experts as reference

FORMATS = ("fp8", "fp4", "shuffled", "float")


def make(format: str, tokens: int, device: str, **sizes: Any) -> dict[str, Any]:
    return reference.example(tokens, format, device, **{"dim": 160, "inner": 96, "count": 8, "k": 3, **sizes})


def sum_bound(x: Tensor, ids: Tensor, experts: Experts, name: str) -> Tensor:
    """Of the error of the products, [pairs, N] float64: x [T, K] or [pairs, K].

    Products of codes are exact (4 significant bits times 4), scales are powers of two: what is left is the
    rounding of K sums, 2^-24 of what is added each. Hopper adds 128 products in fewer bits: at least 13 behind the largest.
    """
    columns = x.shape[1]
    unit = gamma(columns + 2) if x.device.type == "cpu" or isinstance(experts, FloatExperts) else 2.0**-12
    rows = reference.activations(x, experts).abs()
    if len(rows) != ids.numel():
        rows = rows.repeat_interleave(ids.shape[1], 0)
    every = ids.flatten().tolist()
    return unit * torch.stack(
        [row @ reference.matrix(experts, n, name).abs().T for row, n in zip(rows, every, strict=True)]
    )


def rounding(x: Tensor) -> float:
    return U16 if x.dtype == torch.bfloat16 else U32


def check(given: dict[str, Any], **how: Any) -> Tensor:
    """Both products, each from the same inputs as its reference."""
    x, ids, weights, experts = (given[name] for name in ("x", "ids", "weights", "experts"))
    hidden = open_experts(**given, **how)
    want = reference.open_experts(**given)
    wrong = sum_bound(x, ids, experts, "w13")
    gate, up = wrong[:, 0::2], wrong[:, 1::2]
    # |silu(g)| <= limit, |silu'| <= 1.1, |u| <= limit; exp, sum, quotient and two products: 2^-20 of it.
    limit, weight = given["limit"], weights.flatten().double()[:, None]
    bound = (limit * up + 1.1 * limit * gate) * weight + 2.0**-20 * want.abs()
    assert_within(hidden, want, bound + rounding(x) * (want.abs() + bound) + 1e-37)
    out = close_experts(hidden, ids, experts, **how)
    want = reference.close_experts(hidden, ids, experts)
    bound = sum_bound(hidden, ids, experts, "w2").view(want.shape)
    assert_within(out, want, bound + rounding(x) * (want.abs() + bound) + 1e-37)
    assert out.dtype == hidden.dtype == x.dtype
    if "tiles" not in how:
        assert same_bits(run_experts(**given, **how), out)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(format: str, dtype: torch.dtype, device: str) -> None:
    check(make(format, 5, device, dtype=dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_whole_chunks(format: str, device: str) -> None:
    check(make(format, 2, device, dim=256, inner=128))
