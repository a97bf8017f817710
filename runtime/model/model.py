"""The whole network over one flattened batch, and its MTP block.

One code path serves prefill, chunked prefill, decode and verify rows: a token is a row with a position in a
sequence, and reads the sequence's state through the batch's index tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from weft.kernels.hyper import HeadMixer
from weft.kernels.linear import Array, Index, Linear
from weft.kernels.norm import rms_norm
from weft.runtime.cache.capacity import IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.config import ModelConfig
from weft.runtime.model.batch import Batch
from weft.runtime.model.block import Block, rounded
from weft.runtime.model.context import Rope, StepContext
from weft.runtime.model.weights import Weights


class Model:
    """A DeepSeek-V4 network. Stateless: all sequence state is in the `Pools` of the batch."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        quant_sim: bool = False,
        deterministic: bool = True,
    ) -> None:
        """tensors: official names to dequantised values (`weft.runtime.checkpoint`).
        quant_sim: round KV rows to FP8 and indexer vectors to FP4 as the released model does.
        deterministic: False gives up bitwise independence of batch, chunking and drafts for speed."""
        weights = Weights(tensors, dtype, deterministic)
        self.config = config
        self.dtype = dtype
        self.deterministic = deterministic
        self.rope = Rope(config)
        self.embed = weights.model("embed.weight")
        self.blocks = [
            Block(
                config,
                weights.under(f"layers.{i}."),
                i,
                kind,
                hashed=config.is_hash_layer(i),
                quant_sim=quant_sim,
            )
            for i, kind in enumerate(config.layer_kinds)
        ]
        self.readout = Readout(config, weights)
        self.head = weights.wide_linear("head.weight")
        self.mtp = MtpBlock(config, weights, quant_sim) if config.has_mtp else None

    def make_pools(
        self, sizes: PoolSizes, kv_format: KvFormat = "model", index_format: IndexFormat = "model"
    ) -> Pools:
        return Pools(self.config, sizes, self.dtype, kv_format=kv_format, index_format=index_format)

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Backbone streams of every token, before the readout.

        ids: [T] int64 token ids in batch order. Returns [T, hc, D]; zeros for rows of a replay that are left out.
        Writes KV rows, entries and tails of the batch's sequences, and their last streams to `Pools.streams`.
        """
        if batch.replays:
            return self._replay(ids, batch)
        step = StepContext(batch, self.rope)
        h = self._embedded(ids)
        numbers = ids.numpy()
        for block in self.blocks:
            h = block(h, numbers, step)
        streams = torch.from_numpy(h).to(self.dtype)
        batch.pools.streams[torch.from_numpy(batch.slots)] = torch.from_numpy(h[batch.last]).to(self.dtype)
        return streams

    def _embedded(self, ids: Tensor) -> Array:
        """[T] -> [T, hc, D]: every stream begins as the token's embedding."""
        h: Array = self.embed.index_select(0, ids).float().numpy()[:, None].repeat(self.config.hc_mult, 1)
        return h

    def _replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """`forward` with fewer rows from layer to layer."""
        h = self._embedded(ids)
        out = torch.zeros(h.shape, dtype=self.dtype)
        rows = np.arange(batch.tokens)
        part: Batch | None = batch
        for layer, block in enumerate(self.blocks):
            part, keep = batch.at_layer(layer)
            if part is None:
                return out
            h = h[np.searchsorted(rows, keep)]
            rows = keep
            # Rows that are not exact may be computed from anything; they are left out from the next layer on.
            with np.errstate(invalid="ignore", over="ignore"):
                h = block(h, ids.numpy()[rows], StepContext(part, self.rope))
            batch.take_folds(part, keep)
        assert part is not None
        out[torch.from_numpy(rows)] = torch.from_numpy(h).to(self.dtype)
        batch.pools.streams[torch.from_numpy(part.slots)] = torch.from_numpy(h[part.last]).to(self.dtype)
        return out

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] backbone streams -> [n, V] float32."""
        return torch.from_numpy(self.head.array(self.readout(h.float().numpy())))

    @torch.inference_mode()
    def forward_mtp(self, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        """MTP streams of each row, from which `mtp_logits` predicts the token after next.

        h: [T, hc, D] backbone (or, when drafting further, MTP) streams at the batch's positions; next_ids: [T]
        the tokens that follow them. Returns [T, hc, D], zeros for rows of a replay that are left out; writes the
        MTP layer's window rows.
        """
        assert self.mtp is not None, "the config has no MTP block"
        if batch.replays:
            out = torch.zeros(h.shape, dtype=self.dtype)
            part, keep = batch.at_layer(self.config.num_hidden_layers)
            if part is not None:
                with np.errstate(invalid="ignore", over="ignore"):  # as in `_replay`
                    out[keep] = self._drafted(self.mtp, h[keep], next_ids[keep], part)
            return out
        return self._drafted(self.mtp, h, next_ids, batch)

    def _drafted(self, mtp: MtpBlock, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        embedding = self.embed.index_select(0, next_ids).float().numpy()
        out = mtp(h.float().numpy(), embedding, next_ids.numpy(), StepContext(batch, self.rope))
        return torch.from_numpy(out).to(self.dtype)

    @torch.inference_mode()
    def mtp_logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] MTP streams -> [n, V] float32."""
        assert self.mtp is not None, "the config has no MTP block"
        return torch.from_numpy(self.head.array(self.mtp.readout(h.float().numpy())))


class Readout:
    """Streams to the head's input: the head mixer, then the final norm."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.eps = config.rms_norm_eps
        self.mixer = HeadMixer(
            weights.wide_linear("hc_head_fn"),
            weights.wide("hc_head_base"),
            weights.wide("hc_head_scale"),
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        self.norm = weights.array("norm.weight")

    def __call__(self, h: Array) -> Array:
        return rms_norm(self.mixer(h), self.norm, self.eps)


class MtpBlock:
    """The multi-token-prediction layer: a window block over (streams at i, embedding of token i+1)."""

    def __init__(self, config: ModelConfig, weights: Weights, quant_sim: bool) -> None:
        own = weights.under("mtp.0.")
        self.eps = config.rms_norm_eps
        self.enorm, self.hnorm = own.array("enorm.weight"), own.array("hnorm.weight")
        self.e_proj: Linear = own.linear("e_proj.weight")
        self.h_proj: Linear = own.linear("h_proj.weight")
        layer = config.num_hidden_layers
        self.block = Block(config, own, layer, "window", hashed=False, quant_sim=quant_sim)
        self.readout = Readout(config, own)

    def __call__(self, h: Array, embedding: Array, ids: Index, step: StepContext) -> Array:
        e = self.e_proj.array(rms_norm(embedding, self.enorm, self.eps))
        flat = rms_norm(h, self.hnorm, self.eps).reshape(-1, h.shape[2])
        projected = self.h_proj.array(flat).reshape(h.shape)
        return self.block(rounded(e[:, None] + projected, self.block.dtype), ids, step)
