"""One step on the device: what every layer shares, from a `Batch`.

The host sends page tables and a few numbers per token and sequence, in one copy; the lists of pool rows that
queries attend to are made of them on the device. A query's list depends on its position alone: its window's rows
from column 0 on, oldest first, then, at column W, its compressed entries.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weft.kernels.gpu.compress import C4Plan, C128Plan
from weft.kernels.linear import Index
from weft.runtime.cache.capacity import PageKind
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.config import C4, C128, LayerKind
from weft.runtime.model.batch import Batch, Pooling
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda.packed import move

# From so many tokens per sequence on, their keys are gathered once for all of them.
_PREFILL = 8


@dataclass(frozen=True)
class Keys:
    """What each query attends to. index: [T, N] int32 pool rows, -1 where there is none; lengths: [T] int32, how
    many columns count."""

    index: Tensor
    lengths: Tensor


class DeviceStep:
    """Index tensors of a batch on its pools' device. Expires with the batch."""

    def __init__(self, batch: Batch, ids: Tensor, rope: Rope, kinds: Collection[LayerKind]) -> None:
        """ids: [T] int64 on the host. rope: on the device. kinds: of the layers that will run."""
        assert isinstance(batch.pools, DevicePools)
        self.batch = batch
        self.pools = batch.pools
        self._rope = rope
        self.window = batch.pools.config.sliding_window
        self.tokens, self.sequences = batch.tokens, len(batch.spans)
        self.prefill = self.tokens >= _PREFILL * self.sequences
        first, window_table = _window_table(batch)
        arrays = {
            "ids": ids.numpy(),
            "position": batch.positions,
            "sequence": batch.sequence,
            "window_rows": batch.window_rows.numpy(),
            "window_first": first,
            "window_table": window_table,
            "start": batch.starts,
            "count": batch.counts,
            "offset": batch.offsets,
            "slot": batch.slots,
            "last": batch.last,
        }
        if "c4a" in kinds:
            done, base = batch.c4_pooling, batch.pools.base["c4"]
            arrays |= _entries("c4", done, base, self.sequences)
            arrays |= {"c4_key_target": done.target, "c4_table": _entry_table(batch, "c4", C4)}
            counts = batch.ends // C4
            arrays |= {"key_count": counts, "key_start": counts.cumsum() - counts}
        if "c128a" in kinds:
            arrays |= _entries("c128", batch.c128_pooling, batch.pools.base["c128"], self.sequences)
            arrays |= {"c128_table": _entry_table(batch, "c128", C128)}
        self._of = move(arrays, batch.pools.device)
        self.ids = self._of["ids"]
        self.sequence = self._of["sequence"]
        self.position = self._of["position"]
        self.window_rows = self._of["window_rows"]
        self.last = self._of["last"]
        self.slots = self._of["slot"]

    # -- rotations --------------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> Tensor:
        """[T, rope] cosines, then sines."""
        return _rotation(self.position, self._rope.plain)

    @cached_property
    def compressed(self) -> Tensor:
        return _rotation(self.position, self._rope.compressed)

    @cached_property
    def c4_entries(self) -> Tensor:
        return _rotation(self._of["c4_number"] * C4, self._rope.compressed)

    @cached_property
    def c128_entries(self) -> Tensor:
        return _rotation(self._of["c128_number"] * C128, self._rope.compressed)

    # -- keys -------------------------------------------------------------------------------------------

    @cached_property
    def window_keys(self) -> Keys:
        position = self.position[:, None]
        place = (position - (self.window - 1)).clamp(min=0) + self._columns(self.window)
        index = self._rows("window", place.minimum(position), 0)
        return Keys(index.masked_fill(place > position, -1), (self.position + 1).clamp(max=self.window))

    @cached_property
    def c128_keys(self) -> Keys:
        """Window, then every visible entry at its absolute place."""
        columns = int(self.batch.ends.max()) // C128
        return self._with_entries("c128", (self.position + 1) // C128, columns)

    @cached_property
    def c4_keys(self) -> Keys:
        """Window, then k entries: all that are visible where there are no more than k, else what the indexer of a
        layer writes there, each layer anew."""
        k = self.pools.config.index_topk
        return self._with_entries("c4", self.c4_visible, k)

    def _with_entries(self, kind: PageKind, visible: Tensor, columns: int) -> Keys:
        own, entry = self.window_keys, self._columns(columns)
        hidden = entry >= visible[:, None]
        rows = self._rows(kind, entry.expand(hidden.shape).masked_fill(hidden, 0), self.pools.base[kind])
        index = torch.cat((own.index, rows.masked_fill(hidden, -1)), 1)
        seen = visible.clamp(max=columns)
        return Keys(index, torch.where(seen > 0, self.window + seen, own.lengths))

    def _rows(self, kind: PageKind, place: Tensor, base: int) -> Tensor:
        """[T, N] of a sequence's rows of a kind -> rows of the pool."""
        size, table = self.pools.sizes.page, self._of[f"{kind}_table"]
        page = place // size
        if kind == "window":
            page = page - self._of["window_first"][self.sequence][:, None]
        # Places that are masked may lie beyond the table.
        number = table[self.sequence[:, None], page.clamp(max=table.shape[1] - 1)]
        return base + number * size + place % size

    def _columns(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=self.position.device)

    # -- c4a --------------------------------------------------------------------------------------------

    @cached_property
    def c4_visible(self) -> Tensor:
        """[T] entries each token sees, itself completing one included."""
        return (self.position + 1) // C4

    @property
    def most_visible(self) -> int:
        return int(self.batch.c4_visible.max())

    @property
    def c4_table(self) -> Tensor:
        """[S, P] page numbers of each sequence's entries."""
        return self._of["c4_table"]

    @property
    def gathered_keys(self) -> tuple[Tensor, Tensor, int]:
        """For `gather_keys`: how many keys each sequence has, where they begin in a buffer, and its size."""
        return self._of["key_count"], self._of["key_start"], int((self.batch.ends // C4).sum())

    @cached_property
    def key_start(self) -> Tensor:
        """[T] where the keys of a token's sequence begin in that buffer."""
        return self._of["key_start"][self.sequence]

    @cached_property
    def c4_plan(self) -> C4Plan:
        of = self._of
        spans = of["start"], of["count"], of["offset"], of["slot"]
        entries = of["c4_entries"], of["c4_sequence"], of["c4_number"], of["c4_target"]
        return C4Plan(*spans, *entries, of["c4_key_target"])

    # -- c128a ------------------------------------------------------------------------------------------

    @cached_property
    def c128_plan(self) -> C128Plan:
        of = self._of
        spans = of["start"], of["count"], of["offset"], of["slot"]
        return C128Plan(*spans, of["c128_entries"], of["c128_sequence"], of["c128_number"], of["c128_target"])

    def behind(self, layer: int, width: int) -> Tensor | None:
        """[T, 3, d] for the folds behind each row of the `layer`-th c128a layer, if rows may be taken back."""
        folds = self.batch.folds
        if folds is None:
            return None
        folds[layer] = torch.empty(self.tokens, 3, width, device=self.position.device)
        return folds[layer]


def _rotation(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[T] int32, [rope / 2] -> [T, rope]."""
    angle = positions.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), 1)


def _window_table(batch: Batch) -> tuple[Index, Index]:
    """The first page of a sequence that its window still needs, [S], and the pages from it on, [S, P]."""
    page, table = batch.pools.sizes.page, batch.pools.tables["window"].numpy()
    first = np.maximum(batch.starts - batch.pools.config.sliding_window + 1, 0) // page
    width = int(((batch.ends - 1) // page - first).max()) + 1
    number = np.minimum(first[:, None] + np.arange(width), table.shape[1] - 1)
    return first, table[batch.slots[:, None], number] // page


def _entry_table(batch: Batch, kind: PageKind, ratio: int) -> Index:
    """[S, P] page numbers of every entry that a sequence has behind this step; at least one column."""
    page, table = batch.pools.sizes.page, batch.pools.tables[kind].numpy()
    width = max(1, -(-int(batch.ends.max()) // ratio // page))
    pages: Index = table[batch.slots, :width] // page
    return pages


def _entries(kind: PageKind, done: Pooling, base: int, sequences: int) -> dict[str, Index]:
    """The entries that a step completes, for the plans of `compress_c4` and `compress_c128`."""
    each = np.bincount(done.sequence, minlength=sequences)
    return {
        f"{kind}_entries": np.concatenate((np.zeros(1, np.int64), each.cumsum())),
        f"{kind}_sequence": done.sequence,
        f"{kind}_number": done.entry,
        f"{kind}_target": done.target + base,
    }
