"""Mixture of experts of one layer: hash-routed (by token id) or gated, plus one shared expert."""

from __future__ import annotations

from weft.kernels.activation import sqrt_softplus
from weft.kernels.linear import Array, Index
from weft.kernels.moe import Expert, expert_weights, route, run_experts
from weft.runtime.config import ModelConfig
from weft.runtime.model.weights import Weights


class MoE:
    """`hashed` layers take their experts from the token id; the others from biased gate scores."""

    def __init__(self, config: ModelConfig, weights: Weights, hashed: bool) -> None:
        self.config = config
        self.gate = weights.wide_linear("gate.weight")
        self.expert_of_token = weights.raw("gate.tid2eid").long().sort(1).values.numpy() if hashed else None
        self.bias = None if hashed else weights.array("gate.bias")
        self.experts = [_expert(weights.under(f"experts.{i}.")) for i in range(config.n_routed_experts)]
        self.shared = _expert(weights.under("shared_experts."))

    def __call__(self, x: Array, ids: Index) -> Array:
        """x: [T, D]; ids: [T] token ids. Returns [T, D]."""
        config = self.config
        scores = sqrt_softplus(self.gate.array(x))
        if self.expert_of_token is not None:
            experts = self.expert_of_token[ids]
        else:
            assert self.bias is not None
            experts = route(scores, self.bias, config.num_experts_per_tok)
        weights = expert_weights(scores, experts, config.routed_scaling_factor)
        return run_experts(x, experts, weights, self.experts, self.shared, config.swiglu_limit)


def _expert(weights: Weights) -> Expert:
    return Expert(weights.linear("w1.weight", "w3.weight"), weights.linear("w2.weight"))
