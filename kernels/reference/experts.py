"""Experts by their definition, in float64, one pair of token and expert at a time; activations are quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.expert_weights import (
    FP4_GROUP,
    GROUP,
    Experts,
    FloatExperts,
    Fp4Experts,
    Fp8Experts,
    unpacked,
)
from weft.kernels.quant import e2m1_values


def open_experts(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, limit: float) -> Tensor:
    """See `weft.kernels.gpu.experts.open_experts`; float64."""
    tokens, k = ids.shape
    out = torch.empty(tokens, k, experts.shape[2], dtype=torch.float64, device=x.device)
    rows = activations(x, experts)
    for number in ids.unique().tolist():
        token, place = (ids == number).nonzero(as_tuple=True)
        both = rows[token] @ matrix(experts, number, "w13").T
        gate, up = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
        out[token, place] = gate * torch.sigmoid(gate) * up * weights[token, place].double()[:, None]
    return out.flatten(0, 1)


def close_experts(hidden: Tensor, ids: Tensor, experts: Experts) -> Tensor:
    """See `weft.kernels.gpu.experts.close_experts`; float64."""
    tokens, k = ids.shape
    rows = activations(hidden, experts).unflatten(0, (tokens, k))
    out = torch.empty(tokens, k, experts.shape[1], dtype=torch.float64, device=hidden.device)
    for number in ids.unique().tolist():
        token, place = (ids == number).nonzero(as_tuple=True)
        out[token, place] = rows[token, place] @ matrix(experts, number, "w2").T
    return out


def activations(x: Tensor, experts: Experts) -> Tensor:
    """x [*, K] as the products take it, float64: rounded to e4m3 per 128 columns where weights are quantised."""
    if isinstance(experts, FloatExperts):
        return x.double()
    return torch.cat([_rounded(part.double()) for part in x.split(GROUP, 1)], 1)


def _rounded(x: Tensor) -> Tensor:
    """Nearest e4m3 with one power of two a row."""
    top = x.abs().amax(1, keepdim=True).clamp_min(1e-4).float()
    fraction, exponent = torch.frexp(top)  # in [.5, 1): 448 is .875 * 2^9
    scale = 2.0 ** (exponent.double() - 9 + (fraction > 0.875).double())
    rounded: Tensor = (x / scale).float().to(torch.float8_e4m3fn).double() * scale
    return rounded


def matrix(experts: Experts, number: int, name: str) -> Tensor:
    """One expert's w13 or w2, dequantised to float64 [N, K]."""
    if isinstance(experts, Fp4Experts) and number == experts.shape[0] - 1:
        return matrix(experts.shared, 0, name)
    codes: Tensor = getattr(experts, name)[number]
    if isinstance(experts, FloatExperts):
        return codes.double()
    scales: Tensor = getattr(experts, name + "_scales")[number]
    if isinstance(experts, Fp8Experts):
        every = scales.T.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]
        return codes.double() * 2.0 ** (every.double() - 127)
    every = scales.repeat_interleave(FP4_GROUP, 1)
    return e2m1_values(unpacked(codes).cpu()).to(codes.device).double() * 2.0 ** (every.double() - 127)


def expert_tiles(ids: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.gpu.experts.expert_tiles`: the order, and (expert, first, rows) of each tile."""
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    bounds = flat.bincount(minlength=count).cumsum(0).tolist()
    table = torch.zeros(len(flat) // tile + count, 3, dtype=torch.int32)
    begin = 0
    for expert, end in enumerate(bounds):
        for place, first in enumerate(range(begin, end, tile), begin // tile + expert):
            table[place] = torch.tensor([expert, first, min(tile, end - first)])
        begin = end
    return order.int(), table.to(ids.device)


def random_routes(tokens: int, count: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    """ids [tokens, k + 1] of `count` routed experts, ascending, then the shared one; weights that sum to 1.5."""
    chosen = torch.rand(tokens, count, device=device).argsort(1)[:, :k].sort(1).values
    ids = torch.cat((chosen, torch.full((tokens, 1), count, device=device)), 1).int()
    raw = torch.rand(tokens, k, device=device) + 0.1
    weights = torch.cat((1.5 * raw / raw.sum(1, keepdim=True), torch.ones(tokens, 1, device=device)), 1)
    return ids, weights


def example(
    tokens: int,
    format: str,
    device: str,
    *,
    dim: int = 4096,
    inner: int = 2048,
    count: int = 256,
    k: int = 6,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Arguments of `run_experts` with random weights made on the device, V4-Flash's sizes by default (FP8 6.5 GB,
    FP4 3.4 GB). format: "fp8", "fp4" or "float"."""
    ids, weights = random_routes(tokens, count, k, device)
    x = torch.randn(tokens, dim, device=device).to(dtype)
    return {
        "x": x,
        "ids": ids,
        "weights": weights,
        "experts": random_experts(format, dim, inner, count, device, dtype),
        "limit": 10.0,
    }


def random_experts(
    format: str, dim: int, inner: int, count: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Experts:
    """Values of about 1/sqrt(K), so that outputs are about as large as inputs."""

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def scales(*shape: int, around: int) -> Tensor:
        return torch.randint(around - 2, around + 2, shape, dtype=torch.uint8, device=device)

    if format == "float":
        w13 = torch.randn(count + 1, 2 * inner, dim, device=device) * dim**-0.5
        return FloatExperts(
            w13.to(dtype), (torch.randn(count + 1, dim, inner, device=device) * inner**-0.5).to(dtype)
        )
    if format == "fp8":
        sizes = (count + 1, 2 * inner, dim), (count + 1, dim, inner)
        made = []
        for size in sizes:
            code = codes(*size)
            code.bitwise_and_(0xB7)  # without the exponents' upper half: no NaN, at most 1.875 * 2^-1
            made += [code.view(torch.float8_e4m3fn), scales(size[0], -(-size[2] // GROUP), size[1], around=125)]
        return Fp8Experts(*made)
    shared = random_experts("fp8", dim, inner, 0, device)
    assert isinstance(shared, Fp8Experts)
    assert format == "fp4", format
    return Fp4Experts(
        codes(count, 2 * inner, dim // 2),
        scales(count, 2 * inner, dim // FP4_GROUP, around=121),
        codes(count, dim, inner // 2),
        scales(count, dim, inner // FP4_GROUP, around=121),
        shared,
    )
