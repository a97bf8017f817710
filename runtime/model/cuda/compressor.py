"""The compressors of c4a and c128a layers, and the c4a indexer, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.compress import compress_c4, compress_c128
from weft.kernels.gpu.indexer import IndexQuery, gather_keys, index_logits, index_logits_ragged, index_query
from weft.kernels.gpu.topk import top_k_rows
from weft.kernels.kv_rows import PagedRows
from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.linear import project
from weft.runtime.model.cuda.step import DeviceStep, Keys
from weft.runtime.model.cuda.weights import DeviceWeights

# Scores of so many bytes at a time: they are [tokens, entries] float32. Tokens in multiples, so that slices of
# index tensors begin at multiples of 16 bytes.
_SCORES = 256 << 20
_MULTIPLE = 4


class C128Compressor:
    """Dense 128:1 compression. `index` numbers the layer among the c128a layers."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, index: int) -> None:
        self.config = config
        self.index = index
        self.weight = weights.wide_linear("wkv.weight", "wgate.weight")
        self.ape = weights.wide("ape")
        self.norm = weights.wide("norm.weight")

    def write(self, x: Tensor, step: DeviceStep, pool: PagedRows) -> None:
        """Fold x [T, D] into the open groups and store the entries it completes."""
        compress_c128(
            project(x, self.weight, dtype=torch.float32),
            self.ape,
            step.pools.c128_fold[self.index],
            self.norm,
            step.c128_entries,
            step.c128_plan,
            pool,
            self.config.rms_norm_eps,
            behind=step.behind(self.index, self.config.head_dim),
        )


class C4Compressor:
    """Overlapping 4:1 compression with the lightning indexer. `index` numbers the layer among the c4a layers.

    Index queries and keys are rotated by Hadamard's matrix before they are rounded, whatever the format: that
    changes no score, and spreads outliers.
    """

    def __init__(self, config: ModelConfig, weights: DeviceWeights, index: int) -> None:
        """weights: of the attention sublayer."""
        self.config = config
        self.index = index
        own, other = "compressor.", "indexer.compressor."
        parts = [f"{prefix}{name}.weight" for name in ("wkv", "wgate") for prefix in (own, other)]
        # The indexer's head weights come from the same input: their rows are the last.
        self.weight = weights.wide_linear(*parts, "indexer.weights_proj.weight")
        self.ape = torch.cat((weights.wide(own + "ape"), weights.wide(other + "ape")), 1)
        self.norm = weights.wide(own + "norm.weight")
        self.key_norm = weights.wide(other + "norm.weight")
        self.score_scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def write(self, x: Tensor, step: DeviceStep, pool: PagedRows) -> Tensor:
        """Store the entries x [T, D] completes; returns the indexer's head weights [T, n] float32, not scaled."""
        heads = self.config.index_n_heads
        opened = project(x, self.weight, dtype=torch.float32)
        compress_c4(
            opened[:, :-heads],
            self.ape,
            step.pools.c4_tail[self.index],
            self.norm,
            self.key_norm,
            step.c4_entries,
            step.c4_plan,
            pool,
            step.pools.key_pages[self.index],
            self.config.rms_norm_eps,
            hadamard=True,
        )
        return opened[:, -heads:]

    def choose(self, query: Tensor, weights: Tensor, step: DeviceStep) -> Keys:
        """Each query's entries, once all of them are stored. query: [T, n * dI]; weights: of `write`."""
        if step.most_visible > self.config.index_topk:
            self._choose(query, weights, step)
        return step.c4_keys

    def _choose(self, query: Tensor, weights: Tensor, step: DeviceStep) -> None:
        """Write the pool rows of the entries with the highest scores into `step.c4_keys`."""
        config, pool = self.config, step.pools.key_pages[self.index]
        q = query.unflatten(1, (config.index_n_heads, config.index_head_dim))
        codes = pool.layout.codes
        rounded = index_query(q, weights, step.compressed, codes=codes, hadamard=True, factor=self.score_scale)
        score = Scores(rounded, step, pool)
        rows = max(1, _SCORES // (4 * step.most_visible) // _MULTIPLE) * _MULTIPLE
        for start in range(0, step.tokens, rows):
            part = slice(start, start + rows)
            top_k_rows(
                score(part),
                step.c4_visible[part],
                config.index_topk,
                step.c4_table,
                step.sequence[part],
                step.pools.sizes.page,
                step.pools.base["c4"],
                step.c4_keys.index[part],
                step.window,
            )


class Scores:
    """Scores [n, most visible] of some of a step's queries: straight from the pages, or, where a sequence has many
    queries, from its keys gathered once. The bits are the same."""

    def __init__(self, query: IndexQuery, step: DeviceStep, pool: PagedRows) -> None:
        self._query, self._step, self._pool = query, step, pool
        self._gathered = gather_keys(pool, step.c4_table, *step.gathered_keys) if step.prefill else None

    def __call__(self, part: slice) -> Tensor:
        step, width = self._step, self._step.most_visible
        codes, scales, weights = self._query.codes, self._query.scales, self._query.weights
        query = IndexQuery(codes[part], scales[part] if scales is not None else None, weights[part])
        visible = step.c4_visible[part]
        if self._gathered is None:
            return index_logits(query, self._pool, step.c4_table, step.sequence[part], visible, width)
        keys = self._gathered
        return index_logits_ragged(query, keys.codes, keys.scales, step.key_start[part], visible, width)
