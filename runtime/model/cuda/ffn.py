"""Mixture of experts of one layer: hash-routed (by token id) or gated, plus one shared expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.hyper import sigmoid
from weft.runtime.model.cuda.linear import Linear
from weft.runtime.model.cuda.weights import DeviceWeights


class Expert(NamedTuple):
    """A gated MLP: w13 [2I, D] (w1 rows first), w2 [D, I]."""

    w13: Linear
    w2: Linear

    @classmethod
    def of(cls, weights: DeviceWeights) -> Expert:
        return cls(weights.linear("w1.weight", "w3.weight"), weights.linear("w2.weight"))

    def __call__(self, x: Tensor, weights: Tensor | None, limit: float) -> Tensor:
        """[n, D] -> [n, D] float32; weights [n] apply before w2."""
        gate, up = self.w13(x).float().chunk(2, 1)
        gate = gate.clamp(max=limit)
        hidden = gate * sigmoid(gate) * up.clamp(-limit, limit)
        if weights is not None:
            hidden = hidden * weights[:, None]
        return self.w2(hidden).float()


class MoE:
    """`hashed` layers take their experts from the token id; the others from biased gate scores."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, hashed: bool) -> None:
        self.config = config
        self.gate = weights.wide_linear("gate.weight")
        self.expert_of_token = weights.ids("gate.tid2eid").sort(1).values if hashed else None
        self.bias = None if hashed else weights.wide("gate.bias")
        self.experts = [Expert.of(weights.under(f"experts.{i}.")) for i in range(config.n_routed_experts)]
        self.shared = Expert.of(weights.under("shared_experts."))

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: [T, D]; ids: [T] token ids. Returns [T, D] float32."""
        scores = sqrt_softplus(self.gate(x))
        experts = self._route(scores, ids)
        chosen = scores.gather(1, experts)
        weights = chosen / _left_fold(chosen[:, :, None]) * self.config.routed_scaling_factor
        return self._run(x, experts, weights)

    def _route(self, scores: Tensor, ids: Tensor) -> Tensor:
        """[T, k] experts, ascending; of equal scores the lower."""
        if self.expert_of_token is not None:
            return self.expert_of_token[ids]
        assert self.bias is not None
        best = torch.sort(scores + self.bias, dim=1, descending=True, stable=True).indices
        return best[:, : self.config.num_experts_per_tok].sort(1).values

    def _run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Outputs of a token's experts, added in ascending order, plus the shared expert's."""
        limit, (tokens, k) = self.config.swiglu_limit, experts.shape
        order = experts.flatten().sort(stable=True).indices
        rows, factors = x[order // k], weights.flatten()[order]
        # How many rows an expert has is needed on the host: this waits for the device.
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        outputs, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                part = slice(start, start + count)
                outputs.append(expert(rows[part], factors[part], limit))
                start += count
        closed = torch.empty(tokens * k, x.shape[1], dtype=torch.float32, device=x.device)
        closed[order] = torch.cat(outputs)
        return _left_fold(closed.view(tokens, k, -1)) + self.shared(x, None, limit)


def sqrt_softplus(x: Tensor) -> Tensor:
    """The V4 router's scoring function: the root of log(1 + exp(x)), without overflow."""
    return (x.clamp(min=0.0) + torch.log1p(torch.exp(-x.abs()))).sqrt()


def _left_fold(x: Tensor) -> Tensor:
    """Sum [T, N, d] over dim 1, left to right."""
    total = x[:, 0]
    for i in range(1, x.shape[1]):
        total = total + x[:, i]
    return total
