"""The tensors that hold KV state, and the page tables that say where each sequence's rows are.

Per layer one `kv` tensor [rows, head_dim]: first the window rows of every sequence, then, in compressed layers,
the compressed entries. A row number addresses either, so attention gathers both with one index. Row 0 is the
null row: never written, read only where a query has no key.
Page p of a kind covers `page` consecutive rows; the same page numbers serve every layer of that kind.
Fixed per-sequence state (compressor tails, last streams) lives in slots.
"""

from __future__ import annotations

import torch

from weft.kernels.kv_rows import DenseRows, Fp4Keys, Fp8Keys, Fp8KvRows, Rows
from weft.runtime.cache.capacity import (
    C4_TAIL,
    KINDS,
    IndexFormat,
    KvFormat,
    PageKind,
    PoolSizes,
    kinds_of_layers,
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
    ) -> None:
        """dtype: of streams, and of rows in format "model"; fp8 and fp4 are the released model's layouts."""
        self.config = config
        self.sizes = sizes
        self.dtype = dtype
        page, dim = sizes.page, config.head_dim
        pages = {kind: sizes.pages(kind, config.sliding_window) for kind in KINDS}
        self.allocators = {kind: PageAllocator(pages[kind]) for kind in KINDS}
        # Compressed rows follow the window rows of the same layer.
        self.base: dict[PageKind, int] = {
            kind: 0 if kind == "window" else pages["window"] * page for kind in KINDS
        }
        extra = {"window": 0, "c4a": pages["c4"], "c128a": pages["c128"]}
        self.kv = [self._kv_rows(kv_format, pages["window"] + extra[kind]) for kind in kinds_of_layers(config)]
        c4_layers, c128_layers = config.count("c4a"), config.count("c128a")
        self.index_keys = [self._index_rows(index_format, pages["c4"]) for _ in range(c4_layers)]
        tail_width = 4 * (dim + config.index_head_dim)
        self.c4_tail = torch.zeros(c4_layers, sizes.raw, C4_TAIL, tail_width)
        self.c128_fold = torch.zeros(c128_layers, sizes.raw, 3, dim)
        self.streams = torch.zeros(sizes.raw, config.hc_mult, config.hidden_size, dtype=dtype)
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

    def _kv_rows(self, form: KvFormat, pages: int) -> Rows:
        config, page = self.config, self.sizes.page
        if form == "fp8":
            return Fp8KvRows(pages, page, config.nope_head_dim, config.qk_rope_head_dim)
        return DenseRows(torch.zeros(pages * page, config.head_dim, dtype=self.dtype))

    def _index_rows(self, form: IndexFormat, pages: int) -> Rows:
        dim, page = self.config.index_head_dim, self.sizes.page
        if form == "fp8":
            return Fp8Keys(pages, page, dim)
        if form == "fp4":
            return Fp4Keys(pages, page, dim)
        return DenseRows(torch.zeros(pages * page, dim, dtype=self.dtype))

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

    def copy_page(self, kind: PageKind, source: int, target: int) -> None:
        """Copy a page's rows in every layer that has this kind."""
        page = self.sizes.page
        for layer, layer_kind in enumerate(kinds_of_layers(self.config)):
            if kind == "window" or layer_kind == f"{kind}a":
                base = self.base[kind]
                self.copied += self.kv[layer].copy_page(base + source * page, base + target * page, page)
        if kind == "c4":
            for keys in self.index_keys:
                self.copied += keys.copy_page(source * page, target * page, page)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the fixed per-sequence state and the page tables."""
        self.copy_raw(source, target)
        for table in self.tables.values():
            table[target] = table[source]

    def copy_raw(self, source: int, target: int) -> None:
        """Copy tails, folds and streams between slots; those from `sizes.slots` on are the checkpoints'."""
        for tensor in (self.c4_tail, self.c128_fold):
            tensor[:, target] = tensor[:, source]
        self.streams[target] = self.streams[source]
        self.copied += self.raw_bytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of the fixed state of one sequence."""
        return sum(t.nbytes for t in (self.c4_tail, self.c128_fold, self.streams)) // self.sizes.raw

    def check(self) -> None:
        """Invariants of page ownership; raises AssertionError."""
        for allocator in self.allocators.values():
            allocator.check()
        assert len(set(self._free_slots)) == len(self._free_slots)
