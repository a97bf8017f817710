"""Attention of one layer through the GPU ops: window only, c4a or c128a."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.attention import sparse_attention
from weft.kernels.gpu.heads import norm_rope_store
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.cuda.compressor import C4Compressor, C128Compressor
from weft.runtime.model.cuda.linear import project
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
        # The indexer's queries come from the same input: their rows are the last of one product.
        self.wq_b = weights.linear("wq_b.weight", *(["indexer.wq_b.weight"] if kind == "c4a" else []))
        self.kv_norm = weights.wide("kv_norm.weight")
        self.sink = weights.wide("attn_sink")
        self.wo_a = weights.linear("wo_a.weight")
        self.wo_b = weights.linear("wo_b.weight")
        self.scale = config.head_dim**-0.5
        self.compressor: C4Compressor | C128Compressor | None = None
        number = config.layer_kinds[:layer].count(kind)
        if kind == "c4a":
            self.compressor = C4Compressor(config, weights, number)
        elif kind == "c128a":
            self.compressor = C128Compressor(config, weights.under("compressor."), number)

    def __call__(self, x: Tensor, step: DeviceStep) -> Tensor:
        """x: [T, D] normed input -> [T, D], both of the model's dtype. Writes this step's KV rows and entries."""
        config, pool = self.config, step.pools.pages[self.layer]
        turn = step.plain if self.kind == "window" else step.compressed
        low, kv = project(x, self.wq_a_kv).split((config.q_lora_rank, config.head_dim), 1)
        # Compression needs x alone, and little of the card: it runs beside the queries' product.
        with step.side():
            compressed = None if self.compressor is None else self.compressor.write(x, step, pool)
        heads = config.num_attention_heads
        opened = project(low, self.wq_b, norm=(self.q_norm, config.rms_norm_eps))
        q = opened[:, : heads * config.head_dim].unflatten(1, (heads, config.head_dim))
        # Attention takes its products in float16, where what bfloat16 leaves of a query fits.
        wanted = torch.float16 if x.dtype == torch.bfloat16 else x.dtype
        q = norm_rope_store(q, kv, self.kv_norm, turn, step.window_rows, pool, config.rms_norm_eps, dtype=wanted)
        step.join()
        keys = self._keys(opened[:, heads * config.head_dim :], compressed, step)
        out = sparse_attention(
            q, pool, keys.index, keys.lengths, self.sink, self.scale, dtype=x.dtype, rotate_back=turn
        )
        low = project(out.view(len(out), config.o_groups, -1), self.wo_a, groups=config.o_groups)
        return project(low, self.wo_b)

    def _keys(self, query: Tensor, compressed: Tensor | None, step: DeviceStep) -> Keys:
        """query: of the indexer, [T, n * dI]; compressed: its head weights."""
        if isinstance(self.compressor, C4Compressor):
            assert compressed is not None
            return self.compressor.choose(query, compressed, step)
        return step.window_keys if self.compressor is None else step.c128_keys
