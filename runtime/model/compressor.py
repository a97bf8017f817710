"""The compressors of c4a and c128a layers, and the c4a indexer.

They run in float32 whatever the model's dtype (published inference code). Their inputs of unfinished groups are
the only per-sequence state besides KV rows: `Pools.c4_tail` and `Pools.c128_fold`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weft.kernels.attention import KeyList
from weft.kernels.compress import fold_c128, pool_c4
from weft.kernels.constant import constant
from weft.kernels.indexer import select_entries
from weft.kernels.kv_rows import Rows
from weft.kernels.linear import Array, Index
from weft.kernels.norm import rms_norm
from weft.kernels.quant import hadamard, simulate_fp4, simulate_fp8_
from weft.kernels.rope import rotate_
from weft.runtime.config import ModelConfig
from weft.runtime.model.context import StepContext
from weft.runtime.model.weights import Weights


class C128Compressor:
    """Dense 128:1 compression. `index` numbers the layer among the c128a layers."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, quant_sim: bool) -> None:
        self.config = config
        self.index = index
        self.quant_sim = quant_sim
        self.project = weights.wide_linear("wkv.weight", "wgate.weight")
        self.ape = weights.array("ape")
        self.norm = weights.array("norm.weight")

    def write(self, x: Array, step: StepContext, pool: Rows) -> None:
        """Fold x [T, D] into the open groups and store the entries it completes."""
        batch = step.batch
        rows = self.project.array(x)
        half = rows.shape[1] // 2
        values, scores = rows[:, :half], rows[:, half:]
        scores += self.ape[batch.positions % len(self.ape)]
        behind = None
        if batch.folds is not None:
            behind = np.empty((batch.tokens, 3, half), np.float32)
            batch.folds[self.index] = torch.from_numpy(behind)
        state = step.pools.c128_fold.numpy()[self.index]
        entries = fold_c128(values, scores, state, batch.c128_fold, behind)
        if not len(entries):
            return
        entries = rotate_(rms_norm(entries, self.norm, self.config.rms_norm_eps), step.c128_entries)
        stored = torch.from_numpy(entries)
        if self.quant_sim:
            simulate_fp8_(stored, self.config.nope_head_dim)
        pool.store(torch.from_numpy(batch.c128_pooling.target + step.pools.base["c128"]), stored)


class C4Compressor:
    """Overlapping 4:1 compression with the lightning indexer. `index` numbers the layer among the c4a layers.

    The attention's and the indexer's compressors read the same tokens in the same pattern, so one linear and one
    tail serve both: channels are [value, indexer value, score, indexer score], each twice its width.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, indexer: Weights, index: int, quant_sim: bool
    ) -> None:
        self.config = config
        self.index = index
        self.quant_sim = quant_sim
        own = indexer.under("compressor.")
        parts = [source.wide(name) for name in ("wkv.weight", "wgate.weight") for source in (weights, own)]
        self.project = weights.packed(*parts)
        self.ape = np.concatenate((weights.array("ape"), own.array("ape")), 1)
        self.norm = weights.array("norm.weight")
        self.key_norm = own.array("norm.weight")
        self.wq_b = indexer.linear("wq_b.weight")
        self.weights_proj = indexer.linear("weights_proj.weight")
        self.hadamard = weights.packed(hadamard(config.index_head_dim)) if quant_sim else None
        self.score_scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def keys(self, x: Array, qr: Array, step: StepContext, pool: Rows) -> KeyList:
        """Store the entries x [T, D] completes, then choose each query's entries."""
        self._write(x, step, pool)
        return step.batch.c4_all_keys or step.batch.c4_keys(self._select(x, qr, step))

    def _write(self, x: Array, step: StepContext, pool: Rows) -> None:
        batch, config = step.batch, self.config
        rows = self.project.array(x)
        half = rows.shape[1] // 2
        rows[:, half:] += self.ape[batch.positions % len(self.ape)]
        tail = step.pools.c4_tail.numpy()[self.index]
        done = batch.c4_pooling
        if done.entry.size:
            source = np.concatenate((tail[batch.slots].reshape(-1, 2 * half), rows))[batch.c4_sources]
        target, kept = batch.c4_tail_writes
        tail.reshape(-1, 2 * half)[target] = rows[kept]
        if not done.entry.size:
            return
        first = done.entry == 0
        values, scores = source[:, :, :half], source[:, :, half:]
        wide = 2 * config.head_dim
        pooled = pool_c4(values[:, :, :wide], scores[:, :, :wide], first)
        pooled = rotate_(rms_norm(pooled, self.norm, config.rms_norm_eps), step.c4_entries)
        pooled_keys = pool_c4(values[:, :, wide:], scores[:, :, wide:], first)
        pooled_keys = rotate_(rms_norm(pooled_keys, self.key_norm, config.rms_norm_eps), step.c4_entries)
        entries, keys = torch.from_numpy(pooled), torch.from_numpy(pooled_keys)
        if self.quant_sim:
            simulate_fp8_(entries, config.nope_head_dim)
            keys = self._round(keys)
        pool.store(torch.from_numpy(done.target + step.pools.base["c4"]), entries)
        step.pools.index_keys[self.index].store(torch.from_numpy(done.target), keys)

    def _round(self, x: Tensor) -> Tensor:
        """Hadamard rotation and FP4 rounding of [N, dI]; a no-op on scores without rounding, so left out then."""
        assert self.hadamard is not None
        return simulate_fp4(self.hadamard(x))

    def _select(self, x: Array, qr: Array, step: StepContext) -> Index:
        """[T, k] entries with the highest indexer scores."""
        batch, config = step.batch, self.config
        heads, dim = config.index_n_heads, config.index_head_dim
        q = rotate_(self.wq_b.array(qr).reshape(-1, heads, dim), step.compressed.forward)
        if self.quant_sim:
            q = self._round(torch.from_numpy(q.reshape(-1, dim))).numpy().reshape(-1, heads, dim)
        weights = self.weights_proj.array(x) * constant(self.score_scale)
        chosen = np.empty((batch.tokens, config.index_topk), np.int64)
        for blocks in batch.query_blocks:
            select_entries(
                q,
                weights,
                step.pools.index_keys[self.index],
                batch.c4_entry_rows,
                blocks,
                config.index_topk,
                chosen,
            )
        return chosen
