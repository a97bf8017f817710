"""Muon for the hidden matrices, AdamW for everything else.

Muon (Jordan et al., 2024): the momentum of a matrix is replaced by the nearest orthogonal one, by five
Newton-Schulz steps; matrices of one shape go through them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.runtime.config import ModelConfig
from weft.runtime.embedded.params import trained_weights

_BY_ADAM = ("embed.weight", "head.weight", ".gate.weight", "weights_proj.weight")
_STEPS = (  # each brings singular values nearer to 1
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class Rates:
    """Peak learning rates and the rest of the recipe."""

    muon: float = 0.02
    adam: float = 2e-3
    momentum: float = 0.95
    decay: float = 0.05
    clip: float = 1.0


class Optimizer:
    """Owns the momenta; changes the given parameters in place."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Tensor], rates: Rates) -> None:
        self.rates = rates
        kinds = trained_weights(config)
        matrices = {n for n, w in kinds.items() if w.role == "linear" and not n.endswith(_BY_ADAM)}
        self._groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in sorted(matrices):
            rows, columns = params[name].shape[-2:]
            self._groups[rows, columns].append(name)
        self._momenta = {name: torch.zeros_like(params[name]) for name in sorted(matrices)}
        self._params = params
        self._others = [p for n, p in params.items() if p.requires_grad and n not in matrices]
        fused = self._others[0].is_cuda
        self._adam = torch.optim.AdamW(
            self._others, lr=rates.adam, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rates; clears the gradients."""
        rates = self.rates
        torch.nn.utils.clip_grad_norm_(self._others, rates.clip)
        for group in self._adam.param_groups:
            group["lr"] = rates.adam * scale
        self._adam.step()
        for (rows, columns), names in self._groups.items():
            gradients = []
            for name in names:
                gradient, momentum = self._params[name].grad, self._momenta[name]
                assert gradient is not None, name
                momentum.lerp_(gradient, 1 - rates.momentum)
                gradients.append(gradient.lerp(momentum, rates.momentum).reshape(-1, rows, columns))
            updates = orthogonal(torch.cat(gradients))
            size = rates.muon * scale * max(1.0, rows / columns) ** 0.5
            for name, update in zip(names, updates.split([len(g) for g in gradients]), strict=True):
                param = self._params[name]
                param.mul_(1 - rates.muon * scale * rates.decay).sub_(update.view_as(param), alpha=size)
        for param in self._params.values():
            param.grad = None

    def state(self) -> dict[str, Any]:
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        for name, momentum in self._momenta.items():
            momentum.copy_(state["momenta"][name])
        self._adam.load_state_dict(state["adam"])


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> about the nearest (semi-)orthogonal matrices, in float32."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _STEPS:
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    out: Tensor = x.transpose(1, 2) if tall else x
    return out.float()
