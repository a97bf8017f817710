"""Mixture of experts of one layer: hash-routed (by token id) or gated, plus one shared expert."""

from __future__ import annotations

from torch import Tensor

from weft.kernels.gpu.experts import run_experts
from weft.kernels.gpu.routing import route
from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.weights import DeviceWeights


class MoE:
    """`hashed` layers take their experts from the token id; the others from biased gate scores."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, hashed: bool) -> None:
        self.config = config
        self.gate = weights.wide_linear("gate.weight")
        self.table = weights.ids("gate.tid2eid").sort(1).values.contiguous() if hashed else None
        self.bias = None if hashed else weights.wide("gate.bias")
        self.experts = weights.experts(config.n_routed_experts)
        self.deterministic = weights.deterministic

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: [T, D]; ids: [T] int32 token ids. Returns [T, k + 1, D]: each chosen expert's part, ascending, then
        the shared expert's. Their sum is for whoever takes them."""
        config = self.config
        routes = route(
            x,
            self.gate,
            self.bias,
            self.table,
            ids,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            deterministic=self.deterministic,
        )
        return run_experts(x, routes.experts, routes.weights, self.experts, config.swiglu_limit)
