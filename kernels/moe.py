"""Mixture of experts: choose, run, and sum in a fixed order per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.kernels.activation import swiglu
from weft.kernels.linear import Linear
from weft.kernels.reduce import left_fold
from weft.kernels.topk import top_k


class Expert:
    """A gated MLP: w13 [2I, D] (w1 rows first), w2 [D, I]."""

    def __init__(self, w13: Linear, w2: Linear) -> None:
        self.w13 = w13
        self.w2 = w2

    def __call__(self, x: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
        """x: [n, D] -> [n, D] in the weights' dtype; `weight` [n, 1] float32 multiplies before w2."""
        gate, up = self.w13(x).chunk(2, dim=1)
        hidden = swiglu(gate, up, limit)
        if weight is not None:
            hidden = hidden * weight
        return self.w2(hidden)


def route(scores: Tensor, bias: Tensor, k: int) -> Tensor:
    """The k experts with the highest biased score, in ascending order: [T, E] -> [T, k] int64."""
    return top_k(scores + bias, k)


def expert_weights(scores: Tensor, experts: Tensor, scaling: float) -> Tensor:
    """scores of the chosen experts, normalised to sum 1, times `scaling`: [T, k] float32."""
    chosen = scores.gather(1, experts)
    return chosen / left_fold(chosen[:, :, None]) * scaling


def run_experts(x: Tensor, experts: Tensor, weights: Tensor, modules: Sequence[Expert], limit: float) -> Tensor:
    """Sum of the chosen experts' outputs, added in ascending expert order.

    x: [T, D]; experts: [T, k] int64 ascending per token, as the sum's order must not depend on how they were
    chosen; weights: [T, k] float32. Returns [T, D] float32.
    """
    tokens, k = experts.shape
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(modules)).tolist()
    source = order // k
    factor = weights.flatten()[order, None]
    out = torch.empty(tokens * k, x.shape[1])
    start = 0
    for expert, count in zip(modules, counts, strict=True):
        if count:
            part = slice(start, start + count)
            out[order[part]] = expert(x[source[part]], limit, factor[part]).float()
            start += count
    return left_fold(out.view(tokens, k, -1))
