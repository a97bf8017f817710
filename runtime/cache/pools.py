"""The tensors that hold KV state, and the page tables that say where each sequence's rows are.

Per layer one `kv` tensor [rows, head_dim]: first the window rows of every sequence, then, in compressed layers,
the compressed entries. A row number addresses either, so attention gathers both with one index. Row 0 is the
null row: never written, read only where a query has no key.
Page p of a kind covers `page` consecutive rows; the same page numbers serve every layer of that kind.
Fixed per-sequence state (compressor tails, last streams) lives in slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.kv_rows import DenseRows, PagedRows, Rows
from weft.kernels.layouts import RowLayout
from weft.runtime.cache.capacity import (
    C4_TAIL,
    KINDS,
    IndexFormat,
    KvFormat,
    PageKind,
    PoolSizes,
    index_layout,
    kinds_of_layers,
    kv_layout,
)
from weft.runtime.cache.pages import PageAllocator
from weft.runtime.config import ModelConfig


class Pools:
    """Owns all KV memory of one model. Row contents are written by the model, page tables by `Sequence`."""

    def __init__(
        self,
        config: ModelConfig,
        sizes: PoolSizes,
        dtype: torch.dtype = torch.float32,
        *,
        kv_format: KvFormat = "model",
        index_format: IndexFormat = "model",
        device: torch.device | str = "cpu",
    ) -> None:
        """dtype: of streams, and of rows in format "model"; fp8 and fp4 are the released model's layouts.
        device: of rows and slot state; page tables are the host's."""
        self.config = config
        self.sizes = sizes
        self.dtype = dtype
        self.device = torch.device(device)
        page, dim = sizes.page, config.head_dim
        pages = {kind: sizes.pages(kind, config.sliding_window) for kind in KINDS}
        self.allocators = {kind: PageAllocator(pages[kind]) for kind in KINDS}
        # Compressed rows follow the window rows of the same layer.
        self.base: dict[PageKind, int] = {
            kind: 0 if kind == "window" else pages["window"] * page for kind in KINDS
        }
        extra = {"window": 0, "c4a": pages["c4"], "c128a": pages["c128"]}
        layout = kv_layout(config, sizes, kv_format)
        self.kv = [self._rows(layout, pages["window"] + extra[kind], dim) for kind in kinds_of_layers(config)]
        c4_layers, c128_layers = config.count("c4a"), config.count("c128a")
        layout, width = index_layout(config, sizes, index_format), config.index_head_dim
        self.index_keys = [self._rows(layout, pages["c4"], width) for _ in range(c4_layers)]
        tail_width = 4 * (dim + config.index_head_dim)
        self.c4_tail = self._zeros(c4_layers, sizes.raw, C4_TAIL, tail_width)
        self.c128_fold = self._zeros(c128_layers, sizes.raw, 3, dim)
        self.streams = self._zeros(sizes.raw, config.hc_mult, config.hidden_size, dtype=dtype)
        # Row of the first entry of each page of a slot's sequence; 0 (the null page) where it holds none.
        self.tables = {
            kind: torch.zeros(sizes.slots, sizes.table_columns(kind), dtype=torch.int64) for kind in KINDS
        }
        self._free_slots = list(range(sizes.slots - 1, -1, -1))
        self.copied = 0  # bytes, since the pools were made

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor allocated here."""
        fixed = (self.c4_tail, self.c128_fold, self.streams, *self.tables.values())
        return sum(rows.nbytes for rows in (*self.kv, *self.index_keys)) + sum(t.nbytes for t in fixed)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _rows(self, layout: RowLayout | None, pages: int, width: int) -> Rows:
        if layout is not None:
            return PagedRows(pages, layout, self.device)
        return DenseRows(self._zeros(pages * self.sizes.page, width, dtype=self.dtype))

    def numbers(self, values: NDArray[np.int64]) -> Tensor:
        """Index numbers in int32 on the pools' device, by a copy that the host does not wait for."""
        host = torch.from_numpy(values.astype(np.int32))
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def streams_of(self, slots: Sequence[int]) -> Tensor:
        """[n, hc, D] streams of the last token of some slots; a copy."""
        return self.streams.index_select(0, self.numbers(np.array(slots)))

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> int:
        assert self._free_slots, "take_slot without asking free_slots"
        return self._free_slots.pop()

    def return_slot(self, slot: int) -> None:
        assert slot not in self._free_slots
        for table in self.tables.values():
            table[slot] = 0
        self._free_slots.append(slot)

    def copy_pages(self, kind: PageKind, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy pages' rows in every layer that has this kind."""
        if source:
            self.copied += self._copy_pages(kind, torch.tensor(source), torch.tensor(target))

    def _copy_pages(self, kind: PageKind, source: Tensor, target: Tensor) -> int:
        """[n] int64 page numbers of the kind. Returns how many bytes were copied."""
        page = self.sizes.page
        first = self.base[kind] // page
        done = sum(rows.copy_pages(first + source, first + target, page) for rows in self.kv_of(kind))
        keys = self.index_keys if kind == "c4" else ()
        return done + sum(rows.copy_pages(source, target, page) for rows in keys)

    def kv_of(self, kind: PageKind) -> list[Rows]:
        """The KV rows of the layers that have pages of this kind."""
        layers = zip(self.kv, kinds_of_layers(self.config), strict=True)
        return [rows for rows, layer in layers if kind == "window" or layer == f"{kind}a"]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the fixed per-sequence state and the page tables."""
        self.copy_raw(source, target)
        for table in self.tables.values():
            table[target] = table[source]

    def copy_raw(self, source: int, target: int) -> None:
        """Copy tails, folds and streams between slots; those from `sizes.slots` on are the checkpoints'."""
        self._copy_raw(source, target)
        self.copied += self.raw_bytes

    def _copy_raw(self, source: int, target: int) -> None:
        for tensor in (self.c4_tail, self.c128_fold):
            tensor[:, target] = tensor[:, source]
        self.streams[target] = self.streams[source]

    @property
    def raw_bytes(self) -> int:
        """Bytes of the fixed state of one sequence."""
        return sum(t.nbytes for t in (self.c4_tail, self.c128_fold, self.streams)) // self.sizes.raw

    def check(self) -> None:
        """Invariants of page ownership; raises AssertionError."""
        for allocator in self.allocators.values():
            allocator.check()
        assert len(set(self._free_slots)) == len(self._free_slots)
