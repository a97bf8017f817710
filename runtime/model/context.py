"""What every layer of one step reads: the batch's index tensors and the rotations of its positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from weft.kernels.rope import Rotation, inverse_frequencies
from weft.runtime.cache.pools import Pools
from weft.runtime.config import ModelConfig
from weft.runtime.model.batch import Batch


class Rope:
    """Frequencies of the two kinds of layer: plain, and YaRN for the compressed ones."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        dim, scaling = config.qk_rope_head_dim, config.rope_scaling
        self.plain = inverse_frequencies(dim, config.rope_theta)
        if scaling is None:
            self.compressed = inverse_frequencies(dim, config.compress_rope_theta)
        else:
            self.compressed = inverse_frequencies(
                dim,
                config.compress_rope_theta,
                factor=scaling.factor,
                original_length=scaling.original_max_position_embeddings,
                beta_fast=scaling.beta_fast,
                beta_slow=scaling.beta_slow,
            )
        self.plain, self.compressed = self.plain.to(device), self.compressed.to(device)


@dataclass(frozen=True)
class Turn:
    """Rotation of the batch's positions and its inverse (for attention outputs)."""

    forward: Rotation
    inverse: Rotation

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor) -> Turn:
        rotation = Rotation.at(positions, frequencies)
        return cls(rotation, rotation.inverse)


class StepContext:
    """One forward step. Expires with its batch."""

    def __init__(self, batch: Batch, rope: Rope) -> None:
        self.batch = batch
        self._rope = rope
        self._positions = torch.from_numpy(batch.positions)

    @property
    def pools(self) -> Pools:
        return self.batch.pools

    @cached_property
    def plain(self) -> Turn:
        return Turn.at(self._positions, self._rope.plain)

    @cached_property
    def compressed(self) -> Turn:
        return Turn.at(self._positions, self._rope.compressed)

    @cached_property
    def c4_entries(self) -> Rotation:
        return Rotation.at(torch.from_numpy(self.batch.c4_pooling.position), self._rope.compressed)

    @cached_property
    def c128_entries(self) -> Rotation:
        return Rotation.at(torch.from_numpy(self.batch.c128_pooling.position), self._rope.compressed)
