"""What the engine asks of a model, whatever it runs on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from weft.runtime.cache.capacity import IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.config import ModelConfig
from weft.runtime.model.batch import Batch


class Network(Protocol):
    """A DeepSeek-V4 network. Stateless: all sequence state is in the pools of a batch, which `make_pools` makes.

    Token ids are int64 tensors of the host; streams, and logits in float32, are on the device of the pools.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and streams."""

    @property
    def deterministic(self) -> bool:
        """Whether a row has the same bits whatever else is in a step."""

    def make_pools(self, sizes: PoolSizes, kv_format: KvFormat, index_format: IndexFormat) -> Pools:
        """Memory for sequences of this model, on its device."""

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """[T] -> backbone streams [T, hc, D]. What it notes in the batch's folds is valid until the next call."""

    def logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] -> [n, V]."""

    def forward_mtp(self, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        """[T, hc, D], [T] -> MTP streams [T, hc, D]."""

    def mtp_logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] MTP streams -> [n, V]."""
