"""Which experts a token goes to, by its definition, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(x: Tensor, gate: Tensor) -> Tensor:
    """sqrt(softplus(x . g)): [T, D], [E, D] -> [T, E] float64."""
    return F.softplus(x.double() @ gate.double().T, threshold=50.0).sqrt()


def best(biased: Tensor, k: int) -> Tensor:
    """The k largest of each row, of equal ones the lower, in ascending order: [T, E] -> [T, k]."""
    return biased.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    ids: Tensor,
    k: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.gpu.routing.route`: experts [T, k] int64, weights [T, k] float64, without the shared
    one."""
    s = scores(x, gate)
    if table is not None:
        experts = table[ids.long().clamp(min=0)].long()
    else:
        assert bias is not None
        experts = best(s + bias.double(), k)
    chosen = s.gather(1, experts)
    return experts, chosen / chosen.sum(1, keepdim=True) * scaling


def example(tokens: int, device: str, *, dim: int = 4096, experts: int = 256, k: int = 6) -> dict[str, Any]:
    """Arguments of `route` at V4-Flash's sizes, of a layer without a table."""
    from weft.kernels.gpu.weights import FloatWeight

    return {
        "x": torch.randn(tokens, dim, device=device).bfloat16(),
        "gate": FloatWeight.of((torch.randn(experts, dim, device=device) / dim**0.5).bfloat16()),
        "bias": torch.randn(experts, device=device) * 0.1,
        "table": None,
        "ids": torch.arange(tokens, dtype=torch.int32, device=device),
        "k": k,
        "scaling": 1.5,
    }
