"""One step's tokens, flattened over sequences, and the index tensors that every layer shares.

Everything here depends on positions and page tables only, never on token values, and is computed once per step
with numpy operations over the whole batch: at a few tokens they cost a third of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weft.kernels.attention import KeyList
from weft.kernels.compress import FoldPlan
from weft.kernels.indexer import COLUMNS, QueryBlocks, block_rows
from weft.kernels.linear import Index
from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import C4_TAIL, PageKind
from weft.runtime.cache.pools import Pools
from weft.runtime.config import C4, C128

# Prefill queries scored together by the indexer: they read the same keys.
_PREFILL_BLOCK = 16


@dataclass(frozen=True)
class Pooling:
    """Compressed entries that this step completes.

    sequence, entry: [E] which sequence of the batch and which entry of it. target: [E] pool row.
    position: [E] RoPE position (first token of the entry).
    """

    sequence: Index
    entry: Index
    target: Index
    position: Index


class Batch:
    """Index tensors for `spans` over `pools`. Rows of all spans must be reserved; results expire when any
    page table of these sequences changes."""

    def __init__(self, pools: Pools, spans: Sequence[Span], *, drafts: bool = False) -> None:
        """drafts: some rows may be taken back (`model.verify`); the step then notes its c128a folds in `folds`,
        by layer among the c128a layers: [T, 3, d] behind each row."""
        assert spans and all(span.count > 0 for span in spans)
        self.pools = pools
        self.spans = spans
        self.folds: dict[int, Tensor] | None = {} if drafts else None
        table: Index = np.array([(span.slot, span.start, span.count) for span in spans]).T.copy()
        self.slots: Index = table[0]
        self.starts: Index = table[1]
        self.counts: Index = table[2]
        self.ends = self.starts + self.counts
        self.chains: Index = np.array([span.chain for span in spans])
        self.offsets = self.counts.cumsum() - self.counts
        self.sequence = np.repeat(np.arange(len(spans)), self.counts)
        self.tokens = len(self.sequence)
        self.positions = np.arange(self.tokens) + (self.starts - self.offsets)[self.sequence]

    def at_layer(self, layer: int) -> tuple[Batch | None, Index]:
        """The batch of the rows that a layer computes, None if it computes none; and which of this one's rows they
        are."""
        reach = (self.pools.config.sliding_window - 1) * layer
        bound = np.array([span.floor + reach if span.floor else 0 for span in self.spans])
        keep = np.flatnonzero(self.positions >= bound[self.sequence])
        spans = []
        for span, first in zip(self.spans, bound.tolist(), strict=True):
            skipped = min(max(first - span.start, 0), span.count)
            if skipped < span.count:
                spans.append(replace(span, start=span.start + skipped, count=span.count - skipped))
        return (Batch(self.pools, spans, drafts=self.folds is not None) if spans else None), keep

    def take_folds(self, part: Batch, keep: Index) -> None:
        """The folds that `part`, which is this batch `at_layer`, has noted since it was last asked."""
        if self.folds is None or part.folds is None:
            return
        for layer, behind in part.folds.items():
            self.folds[layer] = behind.new_zeros(self.tokens, *behind.shape[1:])
            self.folds[layer][torch.from_numpy(keep)] = behind
        part.folds.clear()

    @cached_property
    def replays(self) -> bool:
        return any(span.floor for span in self.spans)

    # -- rows -------------------------------------------------------------------------------------------

    def rows(self, kind: PageKind, sequence: Index, index: Index) -> Index:
        """Pool row (in `kv`, for compressed kinds relative to their base) of entry `index` of a sequence."""
        page, row = np.divmod(index, self.pools.sizes.page)
        out: Index = self.pools.tables[kind].numpy()[self.slots[sequence], page] + row
        return out

    @cached_property
    def last(self) -> Index:
        """Flat row of each sequence's last token."""
        rows: Index = self.offsets + self.counts - 1
        return rows

    @cached_property
    def window_rows(self) -> Tensor:
        """[T] kv row each token's own KV is written to."""
        rows = self.rows("window", self.sequence, self.positions)
        assert rows.min() > 0, "rows that are not reserved, or that the window has left"
        return torch.from_numpy(rows)

    @cached_property
    def window_index(self) -> Index:
        """[T, W] kv rows of positions t-W+1..t, -1 before the start."""
        width = self.pools.config.sliding_window
        position = self.positions[:, None] - np.arange(width - 1, -1, -1)
        row = self.rows("window", self.sequence[:, None], np.maximum(position, 0))
        row[position < 0] = -1
        return row

    @cached_property
    def window_keys(self) -> KeyList:
        return KeyList.of(self.window_index, self.pools.config.sliding_window)

    # -- c4a --------------------------------------------------------------------------------------------

    @cached_property
    def c4_visible(self) -> Index:
        """[T] entries each token sees, itself completing one included."""
        visible: Index = (self.positions + 1) // C4
        return visible

    def c4_keys(self, entries: Index) -> KeyList:
        """Window and chosen entries; entries: [T, k], -1 where there is none."""
        row = self.rows("c4", self.sequence[:, None], np.maximum(entries, 0)) + self.pools.base["c4"]
        row[entries < 0] = -1
        index = np.concatenate((self.window_index, row), 1)
        return KeyList.of(index, index.shape[1])

    @cached_property
    def c4_all(self) -> Index | None:
        """[T, k] every visible entry, when no token of the batch sees more than k; else None."""
        k = self.pools.config.index_topk
        if self.c4_visible.max() > k:
            return None
        entry = np.arange(k)
        return np.where(entry < self.c4_visible[:, None], entry, -1)

    @cached_property
    def c4_all_keys(self) -> KeyList | None:
        return None if self.c4_all is None else self.c4_keys(self.c4_all)

    @cached_property
    def c4_entry_rows(self) -> Index:
        """[S, E] row of every entry of each sequence in the index key pool, E a multiple of COLUMNS."""
        widest = -(-int(self.ends.max()) // C4)
        width = max(COLUMNS, -(-widest // COLUMNS) * COLUMNS)
        page = self.pools.sizes.page
        index = np.arange(width)
        table = self.pools.tables["c4"].numpy()
        number = np.minimum(index // page, table.shape[1] - 1)
        row = table[self.slots][:, number] + index % page
        row[index >= (self.ends // C4)[:, None]] = 0
        return row

    @cached_property
    def query_blocks(self) -> list[QueryBlocks]:
        """Queries of the batch in blocks of one sequence each: short spans apart from prefill spans."""
        least = block_rows(self.pools.config.index_n_heads)
        short = self.counts <= 2 * least
        groups = []
        for chosen, size in ((short, least), (~short, max(least, _PREFILL_BLOCK))):
            sequences = np.flatnonzero(chosen)
            if sequences.size:
                groups.append(self._blocks_of(sequences, size))
        return groups

    def _blocks_of(self, sequences: Index, size: int) -> QueryBlocks:
        blocks = (self.counts[sequences] + size - 1) // size
        owner = np.repeat(sequences, blocks)
        number = np.arange(owner.size) - np.repeat(blocks.cumsum() - blocks, blocks)
        local = number[:, None] * size + np.arange(size)
        keep = local < self.counts[owner, None]
        rows = self.offsets[owner, None] + np.minimum(local, self.counts[owner, None] - 1)
        return QueryBlocks(rows, keep, owner, self.c4_visible[rows])

    @cached_property
    def c4_pooling(self) -> Pooling:
        return self._pooling("c4", C4)

    @cached_property
    def c4_sources(self) -> Index:
        """[E, 8] rows of (tails of the batch's sequences, then the chunk) that each completed entry pools."""
        done = self.c4_pooling
        position = (done.position[:, None] - C4) + np.arange(C4_TAIL)
        local = position - self.starts[done.sequence, None]
        in_chunk = self.slots.size * C4_TAIL + self.offsets[done.sequence, None] + local
        in_tail = done.sequence[:, None] * C4_TAIL + np.maximum(position, 0) % C4_TAIL
        rows: Index = np.where(local >= 0, in_chunk, in_tail)
        return rows

    @cached_property
    def c4_tail_writes(self) -> tuple[Index, Index]:
        """(flat slot*8 + row of the tail, row of the chunk) for the last rows of each sequence."""
        keep = self.positions >= (self.ends - C4_TAIL)[self.sequence]
        source = np.flatnonzero(keep)
        target = self.slots[self.sequence[source]] * C4_TAIL + self.positions[source] % C4_TAIL
        return target, source

    # -- c128a ------------------------------------------------------------------------------------------

    @cached_property
    def c128_keys(self) -> KeyList:
        """Window, then every visible entry at its absolute place."""
        width = self.pools.config.sliding_window
        visible = (self.positions + 1) // C128
        columns = -(-int(visible.max()) // width) * width
        if columns == 0:
            return self.window_keys
        entry = np.arange(columns)
        hidden = entry >= visible[:, None]
        row = self.rows("c128", self.sequence[:, None], np.where(hidden, 0, entry)) + self.pools.base["c128"]
        row[hidden] = -1
        return KeyList.of(np.concatenate((self.window_index, row), 1), width)

    @cached_property
    def c128_pooling(self) -> Pooling:
        return self._pooling("c128", C128)

    @cached_property
    def c128_fold(self) -> FoldPlan:
        first_group = self.starts // C128
        groups = (self.ends - 1) // C128 - first_group + 1
        owner = np.repeat(np.arange(groups.size), groups)
        number = np.arange(owner.size) - (groups.cumsum() - groups)[owner] + first_group[owner]
        start = np.maximum(number * C128, self.starts[owner])
        end = np.minimum((number + 1) * C128, self.ends[owner])
        taken = end - start
        order = np.argsort(-taken, kind="stable")
        row = (self.offsets[owner] + start - self.starts[owner])[order]
        sizes = taken[order]
        active = np.arange(sizes[0])[:, None] < sizes
        rows = tuple(row[:n] + i for i, n in enumerate(active.sum(1).tolist()))
        closed = (end % C128 == 0)[order]
        # Completed entries come back in the order of `c128_pooling`: by sequence, then by entry.
        rank = np.argsort(order)
        closed_groups = rank[np.flatnonzero((end % C128 == 0) & (end > self.chains[owner]))]
        return FoldPlan(
            rows,
            self.slots[owner][order],
            (start % C128 == 0)[order],
            closed_groups,
            np.flatnonzero(~closed),
        )

    def _pooling(self, kind: PageKind, ratio: int) -> Pooling:
        first = np.maximum(self.starts, self.chains) // ratio
        counts = np.maximum(self.ends // ratio - first, 0)
        sequence = np.repeat(np.arange(counts.size), counts)
        entry = np.arange(sequence.size) - (counts.cumsum() - counts)[sequence] + first[sequence]
        return Pooling(sequence, entry, self.rows(kind, sequence, entry), entry * ratio)
