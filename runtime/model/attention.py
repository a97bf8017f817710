"""Attention of one layer: window only, c4a or c128a.

Source: DeepSeek-V4 report, hybrid attention; published inference code for the order of norm, RoPE and rounding.
"""

from __future__ import annotations

import numpy as np
import torch

from weft.kernels.attention import KeyList, sparse_attention
from weft.kernels.kv_rows import Rows
from weft.kernels.linear import Array
from weft.kernels.norm import rms_norm
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
        self.q_norm = weights.array("q_norm.weight")
        self.wq_b = weights.linear("wq_b.weight")
        self.kv_norm = weights.array("kv_norm.weight")
        self.sink = weights.array("attn_sink")
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

    def __call__(self, x: Array, step: StepContext) -> Array:
        """x: [T, D] normed input -> [T, D]. Writes this step's KV rows and entries."""
        config, batch = self.config, step.batch
        turn = step.plain if self.kind == "window" else step.compressed
        both = self.wq_a_kv.array(x)
        qr = rms_norm(both[:, : config.q_lora_rank], self.q_norm, config.rms_norm_eps)
        q = self.wq_b.array(qr).reshape(-1, config.num_attention_heads, config.head_dim)
        q = rotate_(rms_norm(q, None, config.rms_norm_eps), turn.forward)
        kv = rms_norm(both[:, config.q_lora_rank :], self.kv_norm, config.rms_norm_eps)
        row = torch.from_numpy(rotate_(kv, turn.forward))
        if self.quant_sim:
            simulate_fp8_(row, config.nope_head_dim)
        pool = step.pools.kv[self.layer]
        pool.store(batch.window_rows, row)
        out = sparse_attention(q, pool, self._keys(x, qr, step, pool), self.sink, self.scale)
        return self._project(rotate_(out, turn.inverse))

    def _keys(self, x: Array, qr: Array, step: StepContext, pool: Rows) -> KeyList:
        if isinstance(self.compressor, C4Compressor):
            return self.compressor.keys(x, qr, step, pool)
        if isinstance(self.compressor, C128Compressor):
            self.compressor.write(x, step, pool)
            return step.batch.c128_keys
        return step.batch.window_keys

    def _project(self, out: Array) -> Array:
        """[T, H, d] -> [T, D] through the grouped low-rank output."""
        parts = out.reshape(len(out), len(self.wo_a), -1)
        low = [linear.array(parts[:, i]) for i, linear in enumerate(self.wo_a)]
        return self.wo_b.array(np.concatenate(low, 1))
