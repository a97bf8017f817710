"""Attention of one layer: window only, c4a or c128a.

Source: DeepSeek-V4 report, hybrid attention; published inference code for the order of norm, RoPE and rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.attention import KeyList, sparse_attention
from weft.kernels.kv_rows import Rows
from weft.kernels.norm import inverse_rms, rms_norm
from weft.kernels.quant import simulate_fp8_
from weft.kernels.rope import rotate_
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.compressor import C4Compressor, C128Compressor
from weft.runtime.model.context import StepContext
from weft.runtime.model.weights import Weights


class Attention:
    """One attention sublayer. `layer` numbers its `kv` tensor in the pools."""

    def __init__(
        self, config: ModelConfig, weights: Weights, layer: int, kind: LayerKind, quant_sim: bool
    ) -> None:
        self.config = config
        self.layer = layer
        self.kind = kind
        self.quant_sim = quant_sim
        self.wq_a_kv = weights.linear("wq_a.weight", "wkv.weight")
        self.q_norm = weights.wide("q_norm.weight")
        self.wq_b = weights.linear("wq_b.weight")
        self.kv_norm = weights.wide("kv_norm.weight")
        self.sink = weights.wide("attn_sink")
        # wo_a is block-diagonal over groups: one linear per group.
        groups = weights.model("wo_a.weight").chunk(config.o_groups)
        self.wo_a = [weights.packed(group) for group in groups]
        self.wo_b = weights.linear("wo_b.weight")
        self.scale = config.head_dim**-0.5
        self.compressor: C4Compressor | C128Compressor | None = None
        compressed = weights.under("compressor.")
        if kind == "c4a":
            index = config.layer_kinds[:layer].count("c4a")
            self.compressor = C4Compressor(config, compressed, weights.under("indexer."), index, quant_sim)
        elif kind == "c128a":
            index = config.layer_kinds[:layer].count("c128a")
            self.compressor = C128Compressor(config, compressed, index, quant_sim)

    def __call__(self, x: Tensor, step: StepContext) -> Tensor:
        """x: [T, D] normed input in the model's dtype -> [T, D]. Writes this step's KV rows and entries."""
        config, batch = self.config, step.batch
        turn = step.plain if self.kind == "window" else step.compressed
        qr, kv = self.wq_a_kv(x).split([config.q_lora_rank, config.head_dim], dim=1)
        qr = rms_norm(qr, self.q_norm, config.rms_norm_eps)
        q = self.wq_b(qr).unflatten(1, (config.num_attention_heads, config.head_dim)).float()
        q = rotate_(q * inverse_rms(q, config.rms_norm_eps), turn.forward)
        row = rotate_(rms_norm(kv.float(), self.kv_norm, config.rms_norm_eps), turn.forward)
        if self.quant_sim:
            simulate_fp8_(row, config.nope_head_dim)
        pool = step.pools.kv[self.layer]
        pool.store(batch.window_rows, row)
        out = sparse_attention(q, pool, self._keys(x, qr, step, pool), self.sink, self.scale)
        return self._project(rotate_(out, turn.inverse))

    def _keys(self, x: Tensor, qr: Tensor, step: StepContext, pool: Rows) -> KeyList:
        if isinstance(self.compressor, C4Compressor):
            return self.compressor.keys(x, qr, step, pool)
        if isinstance(self.compressor, C128Compressor):
            self.compressor.write(x, step, pool)
            return step.batch.c128_keys
        return step.batch.window_keys

    def _project(self, out: Tensor) -> Tensor:
        """[T, H, d] -> [T, D] through the grouped low-rank output."""
        parts = out.flatten(1).chunk(len(self.wo_a), dim=1)
        low = [linear(part) for linear, part in zip(self.wo_a, parts, strict=True)]
        return self.wo_b(torch.cat(low, 1))
