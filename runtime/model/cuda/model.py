"""The whole network over one flattened batch on a device, and its MTP block. See `weft.runtime.model.base`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.runtime.cache.capacity import IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.errors import ConfigError
from weft.runtime.model.batch import Batch
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda.block import Block
from weft.runtime.model.cuda.hyper import HeadMixer, rms_norm
from weft.runtime.model.cuda.linear import Linear
from weft.runtime.model.cuda.step import DeviceStep
from weft.runtime.model.cuda.weights import DeviceWeights

_MTP_KINDS: tuple[LayerKind, ...] = ("window",)


class DeviceModel:
    """A DeepSeek-V4 network on device tensors. Stateless: all sequence state is in the batch's `DevicePools`."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        deterministic: bool = False,
    ) -> None:
        """tensors: official names to dequantised values (`weft.runtime.checkpoint`); each is asked for once.
        device: "cpu" runs the ops' references, or Triton's interpreter, for tests. deterministic: linears that
        give a row the same bits in every batch; there are none for GPUs yet."""
        self.device = torch.device(device)
        if deterministic and self.device.type != "cpu":
            raise ConfigError("deterministic", True, "products of cuBLAS depend on the number of rows")
        weights = DeviceWeights(tensors, dtype, self.device, deterministic)
        self.config = config
        self.dtype = dtype
        self.deterministic = deterministic
        self.rope = Rope(config, self.device)
        self.embed = weights.model("embed.weight")
        self.blocks = [
            Block(config, weights.under(f"layers.{i}."), i, kind, hashed=config.is_hash_layer(i))
            for i, kind in enumerate(config.layer_kinds)
        ]
        self.readout = Readout(config, weights)
        self.head = weights.wide_linear("head.weight")
        self.mtp = MtpBlock(config, weights.under("mtp.0.")) if config.has_mtp else None

    def make_pools(self, sizes: PoolSizes, kv_format: KvFormat, index_format: IndexFormat) -> DevicePools:
        return DevicePools(
            self.config,
            sizes,
            self.dtype,
            kv_format=kv_format,
            index_format=index_format,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Backbone streams of every token, before the readout.

        ids: [T] int64 on the host, in batch order. Returns [T, hc, D] on the device; zeros for rows of a replay
        that are left out. Writes KV rows, entries, tails and last streams of the batch's sequences.
        """
        if batch.replays:
            return self._replay(ids, batch)
        step = self._step(batch, ids)
        h = self._embedded(step.ids)
        for block in self.blocks:
            h = block(h, step.ids, step)
        step.pools.streams[step.slots] = h[step.last]
        return h

    def _step(self, batch: Batch, ids: Tensor) -> DeviceStep:
        return DeviceStep(batch, ids, self.rope, set(self.config.layer_kinds))

    def _embedded(self, ids: Tensor) -> Tensor:
        """[T] -> [T, hc, D]: every stream begins as the token's embedding."""
        return self.embed[ids][:, None].repeat(1, self.config.hc_mult, 1)

    def _replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """`forward` with fewer rows from layer to layer."""
        out = torch.zeros(len(ids), self.config.hc_mult, self.config.hidden_size, dtype=self.dtype)
        out = out.to(self.device)
        h = self._embedded(ids.to(self.device))
        rows = torch.arange(batch.tokens)
        step: DeviceStep | None = None
        for layer, block in enumerate(self.blocks):
            part, keep = batch.at_layer(layer)
            if part is None:
                return out
            kept = torch.from_numpy(keep)
            if step is None or len(kept) < len(rows):
                # Rows that are not exact may be computed from anything; they are left out from here on.
                h = h[torch.searchsorted(rows, kept).to(self.device)]
                rows, step = kept, self._step(part, ids[kept])
            h = block(h, step.ids, step)
            batch.take_folds(step.batch, keep)
        assert step is not None
        out[rows.to(self.device)] = h
        step.pools.streams[step.slots] = h[step.last]
        return out

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] backbone streams -> [n, V] float32 on the device."""
        return self.head(self.readout(h))

    @torch.inference_mode()
    def forward_mtp(self, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        """MTP streams of each row, from which `mtp_logits` predicts the token after next.

        h: [T, hc, D] backbone (or, when drafting further, MTP) streams at the batch's positions; next_ids: [T] on
        the host, the tokens that follow them. Returns [T, hc, D], zeros for rows of a replay that are left out;
        writes the MTP layer's window rows.
        """
        assert self.mtp is not None, "the config has no MTP block"
        if not batch.replays:
            return self._drafted(self.mtp, h, next_ids, batch)
        out = torch.zeros_like(h)
        part, keep = batch.at_layer(self.config.num_hidden_layers)
        if part is not None:
            kept = torch.from_numpy(keep)
            rows = kept.to(self.device)
            out[rows] = self._drafted(self.mtp, h[rows], next_ids[kept], part)
        return out

    def _drafted(self, mtp: MtpBlock, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        step = DeviceStep(batch, next_ids, self.rope, _MTP_KINDS)
        return mtp(h, self.embed[step.ids], step)

    @torch.inference_mode()
    def mtp_logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] MTP streams -> [n, V] float32 on the device."""
        assert self.mtp is not None, "the config has no MTP block"
        return self.head(self.mtp.readout(h))


class Readout:
    """Streams to the head's input: the head mixer, then the final norm."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.eps = config.rms_norm_eps
        self.mixer = HeadMixer(config, weights)
        self.norm = weights.wide("norm.weight")

    def __call__(self, h: Tensor) -> Tensor:
        """[n, hc, D] -> [n, D] float32."""
        return rms_norm(self.mixer(h), self.norm, self.eps)


class MtpBlock:
    """The multi-token-prediction layer: a window block over (streams at i, embedding of token i+1)."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.eps = config.rms_norm_eps
        self.enorm, self.hnorm = weights.wide("enorm.weight"), weights.wide("hnorm.weight")
        self.e_proj: Linear = weights.linear("e_proj.weight")
        self.h_proj: Linear = weights.linear("h_proj.weight")
        self.block = Block(config, weights, config.num_hidden_layers, "window", hashed=False)
        self.readout = Readout(config, weights)

    def __call__(self, h: Tensor, embedding: Tensor, step: DeviceStep) -> Tensor:
        """[T, hc, D], [T, D] -> [T, hc, D] in the dtype of h."""
        e = self.e_proj(rms_norm(embedding, self.enorm, self.eps)).float()
        projected = self.h_proj(rms_norm(h, self.hnorm, self.eps).flatten(0, 1)).float().view(h.shape)
        return self.block((e[:, None] + projected).to(h.dtype), step.ids, step)
