"""Attention of one layer through the GPU ops: window only, c4a or c128a."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.attention import sparse_attention
from weft.kernels.gpu.heads import norm_rope_store
from weft.kernels.gpu.output import inverse_rope
from weft.kernels.kv_rows import PagedRows
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.cuda.compressor import C4Compressor, C128Compressor
from weft.runtime.model.cuda.hyper import rms_norm
from weft.runtime.model.cuda.step import DeviceStep, Keys
from weft.runtime.model.cuda.weights import DeviceWeights


class Attention:
    """One attention sublayer. `layer` numbers its pages in the pools."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, layer: int, kind: LayerKind) -> None:
        self.config = config
        self.layer = layer
        self.kind = kind
        self.wq_a_kv = weights.linear("wq_a.weight", "wkv.weight")
        self.q_norm = weights.wide("q_norm.weight")
        self.wq_b = weights.linear("wq_b.weight")
        self.kv_norm = weights.wide("kv_norm.weight")
        self.sink = weights.wide("attn_sink")
        self.wo_a = weights.grouped_linear("wo_a.weight", config.o_groups)
        self.wo_b = weights.linear("wo_b.weight")
        self.scale = config.head_dim**-0.5
        self.compressor: C4Compressor | C128Compressor | None = None
        compressed = weights.under("compressor.")
        number = config.layer_kinds[:layer].count(kind)
        if kind == "c4a":
            self.compressor = C4Compressor(config, compressed, weights.under("indexer."), number)
        elif kind == "c128a":
            self.compressor = C128Compressor(config, compressed, number)

    def __call__(self, x: Tensor, step: DeviceStep) -> Tensor:
        """x: [T, D] normed input -> [T, D], both of the model's dtype. Writes this step's KV rows and entries."""
        config, pool = self.config, step.pools.pages[self.layer]
        turn = step.plain if self.kind == "window" else step.compressed
        low, kv = self.wq_a_kv(x).split((config.q_lora_rank, config.head_dim), 1)
        qr = rms_norm(low, self.q_norm, config.rms_norm_eps).to(x.dtype)
        q = self.wq_b(qr).unflatten(1, (config.num_attention_heads, config.head_dim))
        # Attention takes its products in float16, where what bfloat16 leaves of a query fits.
        wanted = torch.float16 if x.dtype == torch.bfloat16 else x.dtype
        q = norm_rope_store(q, kv, self.kv_norm, turn, step.window_rows, pool, config.rms_norm_eps, dtype=wanted)
        keys = self._keys(x, qr, step, pool)
        out = sparse_attention(q, pool, keys.index, keys.lengths, self.sink, self.scale, dtype=x.dtype)
        out = inverse_rope(out, turn)
        return self.wo_b(self.wo_a(out.view(len(out), config.o_groups, -1)))

    def _keys(self, x: Tensor, qr: Tensor, step: DeviceStep, pool: PagedRows) -> Keys:
        if isinstance(self.compressor, C4Compressor):
            return self.compressor.keys(x, qr, step, pool)
        if isinstance(self.compressor, C128Compressor):
            self.compressor.write(x, step, pool)
            return step.c128_keys
        return step.window_keys
