"""Mixture of experts: choose, run, and sum in a fixed order per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.activation import swiglu
from weft.kernels.linear import Linear
from weft.kernels.reduce import left_fold
from weft.kernels.topk import top_k


class Expert(NamedTuple):
    """A gated MLP: w13 [2I, D] (w1 rows first), w2 [D, I]."""

    w13: Linear
    w2: Linear


def route(scores: Tensor, bias: Tensor, k: int) -> Tensor:
    """The k experts with the highest biased score, in ascending order: [T, E] -> [T, k] int64."""
    return top_k(scores + bias, k)


def expert_weights(scores: Tensor, experts: Tensor, scaling: float) -> Tensor:
    """scores of the chosen experts, normalised to sum 1, times `scaling`: [T, k] float32."""
    chosen = scores.gather(1, experts)
    return chosen / left_fold(chosen[:, :, None]) * scaling


def run_experts(
    x: Tensor, experts: Tensor, weights: Tensor, modules: Sequence[Expert], shared: Expert, limit: float
) -> Tensor:
    """The chosen experts' weighted outputs, added in ascending expert order, plus the shared expert's.

    x: [T, D]; experts: [T, k] int64 ascending per token, as the sum's order must not depend on how they were
    chosen; weights: [T, k] float32, applied before w2. Returns [T, D] float32.
    """
    tokens, k = experts.shape
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(modules)).tolist()
    # Rows in expert order; only the products go expert by expert, everything between them is one call.
    rows = x.index_select(0, order // k)
    used = [(module, count) for module, count in zip(modules, counts, strict=True) if count]
    sizes = [count for _, count in used]
    opened = [module.w13(part) for (module, _), part in zip(used, rows.split(sizes), strict=True)]
    gate, up = torch.cat([*opened, shared.w13(x)]).chunk(2, dim=1)
    hidden = swiglu(gate, up, limit)
    routed = hidden[: tokens * k] * weights.flatten().index_select(0, order)[:, None]
    closed = [module.w2(part) for (module, _), part in zip(used, routed.split(sizes), strict=True)]
    out = torch.empty(tokens * k, x.shape[1])
    out[order] = torch.cat(closed).float()
    return left_fold(out.view(tokens, k, -1)) + shared.w2(hidden[tokens * k :]).float()
