"""Weights as a checkpoint of V4 holds them, random and made on a device when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log2

import torch
from torch import Tensor

from weft.runtime.checkpoint.layout import FP4_GROUP, FP8_BLOCK, Weight, weights
from weft.runtime.checkpoint.quant import Quantised
from weft.runtime.config import ModelConfig


class RandomWeights(Mapping[str, "Tensor | Quantised"]):
    """Of the size that they have in a model: products of normalised inputs are about as large as those. Values are
    not the same twice."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self._weights = {weight.name: weight for weight in weights(config)}
        self._experts, self._device = config.n_routed_experts, device

    def __getitem__(self, name: str) -> Tensor | Quantised:
        weight = self._weights[name]
        if weight.storage in ("fp8", "fp4"):
            return self._quantised(weight)
        if weight.role == "expert_table":
            tokens, picks = weight.shape
            return torch.rand(tokens, self._experts, device=self._device).topk(picks).indices
        noise = torch.randn(weight.shape, device=self._device)
        if weight.role == "norm":
            return 1 + 0.1 * noise
        scale = weight.shape[-1] ** -0.5 if weight.role in ("linear", "hc_fn") else 0.5
        return (scale * noise).to(torch.bfloat16 if weight.storage == "bf16" else torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _quantised(self, weight: Weight) -> Quantised:
        """Codes of a mean square of about 8 (e2m1, uniform) or 30 (e4m3); scaled, about 1 / columns."""
        rows, columns = weight.shape
        if weight.storage == "fp4":
            codes = torch.randint(-128, 128, (rows, -(-columns // 2)), dtype=torch.int8, device=self._device)
            grid, square = (rows, -(-columns // FP4_GROUP)), 8.0
        else:
            codes = (5.5 * torch.randn(rows, columns, device=self._device)).to(torch.float8_e4m3fn)
            grid, square = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), 30.0
        exponent = round(-0.5 * log2(square * columns)) + 127
        scale = torch.full(grid, exponent, dtype=torch.uint8, device=self._device)
        return Quantised(codes, scale.view(torch.float8_e8m0fnu), (rows, columns))
