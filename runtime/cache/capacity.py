"""How much KV memory a configuration takes and what it holds, by arithmetic: no tensor is needed to know.

`Pools` allocates exactly what `Capacity` counts (tested), so the figures printed at start are the bytes in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8, kv_fp8
from weft.runtime.config import C4, C128, LayerKind, ModelConfig

PageKind = Literal["window", "c4", "c128"]
KvFormat = Literal["model", "fp8"]
IndexFormat = Literal["model", "fp8", "fp4"]

KINDS: tuple[PageKind, ...] = ("window", "c4", "c128")
TOKENS_PER_ROW: dict[PageKind, int] = {"window": 1, "c4": C4, "c128": C128}
# Rows of compressor input a c4a layer keeps: the previous window of 4 and the open one.
C4_TAIL = 2 * C4
_FLOAT32 = 4
_INT64 = 8


@dataclass(frozen=True)
class PoolSizes:
    """How much state to hold. tokens: history over all sequences; slots: live sequences, forks included;
    context: longest sequence; burst: tokens of prefill in flight at once, whose window rows are all kept until
    the step ends; page: rows per page; checkpoints: saved raw states, each with window rows of its own."""

    tokens: int = 65536
    slots: int = 64
    context: int = 65536
    burst: int = 2048
    page: int = 32
    checkpoints: int = 64

    @property
    def raw(self) -> int:
        """Raw states: those of live sequences, then those saved."""
        return self.slots + self.checkpoints

    def pages(self, kind: PageKind, window: int) -> int:
        """Pages of a kind, the null page included. A slot's first and last page may be partly used."""
        if kind == "window":
            return 1 + math.ceil((self.burst + self.raw * window) / self.page) + 2 * self.raw
        return 1 + math.ceil(self.tokens // TOKENS_PER_ROW[kind] / self.page) + 2 * self.slots

    def table_columns(self, kind: PageKind) -> int:
        """Pages of the longest sequence."""
        return math.ceil(self.context / TOKENS_PER_ROW[kind] / self.page) + 1


@dataclass(frozen=True)
class Capacity:
    """Bytes of each part of the pools; `itemsize` is that of the model's dtype."""

    config: ModelConfig
    sizes: PoolSizes
    itemsize: int = 4
    kv_format: KvFormat = "model"
    index_format: IndexFormat = "model"

    @property
    def parts(self) -> dict[str, int]:
        config, sizes = self.config, self.sizes
        layers = {kind: config.count(kind) for kind in ("window", "c4a", "c128a")}
        pages = {kind: sizes.pages(kind, config.sliding_window) for kind in KINDS}
        width = 4 * (config.head_dim + config.index_head_dim)
        return {
            "window rows": self._layers() * pages["window"] * self._kv_page(),
            "c4a entries": layers["c4a"] * pages["c4"] * self._kv_page(),
            "c4a indexer keys": layers["c4a"] * pages["c4"] * self._index_page(),
            "c128a entries": layers["c128a"] * pages["c128"] * self._kv_page(),
            "compressor tails": sizes.raw
            * _FLOAT32
            * (layers["c4a"] * C4_TAIL * width + layers["c128a"] * 3 * config.head_dim),
            "streams": sizes.raw * config.hc_mult * config.hidden_size * self.itemsize,
            "page tables": sizes.slots * _INT64 * sum(sizes.table_columns(kind) for kind in KINDS),
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def raw(self) -> int:
        """Bytes of the raw state of one sequence, which a fork copies."""
        parts = self.parts
        return (parts["compressor tails"] + parts["streams"]) // self.sizes.raw

    def sequences(self, length: int) -> int:
        """How many sequences of `length` tokens, none sharing anything, fit at once."""
        if length > self.sizes.context:
            return 0
        fits = [self.sizes.slots]
        for kind in ("c4", "c128"):
            pages = math.ceil(length // TOKENS_PER_ROW[kind] / self.sizes.page)
            if pages:
                fits.append((self.sizes.pages(kind, self.config.sliding_window) - 1) // pages)
        return min(fits)

    def report(self) -> list[tuple[str, str]]:
        """Label and value rows: the parts, the total, and sequences of several lengths."""
        rows = [(label, f"{size / 2**20:,.1f} MiB") for label, size in self.parts.items()]
        rows.append(("KV memory", f"{self.total / 2**20:,.1f} MiB"))
        length = 1024
        while length <= self.sizes.context:
            rows.append((f"sequences of {length:,} tokens", f"{self.sequences(length):,}"))
            length *= 8
        return rows

    def line(self) -> str:
        """The report in one line."""
        fits = ", ".join(f"{self.sequences(n):,} of {n:,}" for n in (1024, 8192, 65536) if n <= self.sizes.context)
        return f"KV memory {self.total / 2**20:,.1f} MiB; sequences it holds: {fits} tokens"

    def _layers(self) -> int:
        """Layers with window rows: all, and the MTP block."""
        return self.config.num_hidden_layers + self.config.has_mtp

    def _kv_page(self) -> int:
        layout = kv_layout(self.config, self.sizes, self.kv_format)
        return layout.page_bytes if layout else self.sizes.page * self.config.head_dim * self.itemsize

    def _index_page(self) -> int:
        layout = index_layout(self.config, self.sizes, self.index_format)
        return layout.page_bytes if layout else self.sizes.page * self.config.index_head_dim * self.itemsize


def kv_layout(config: ModelConfig, sizes: PoolSizes, form: KvFormat) -> RowLayout | None:
    """Of window rows and entries; None if they are stored in the model's dtype."""
    return kv_fp8(sizes.page, config.nope_head_dim, config.qk_rope_head_dim) if form == "fp8" else None


def index_layout(config: ModelConfig, sizes: PoolSizes, form: IndexFormat) -> RowLayout | None:
    """Of indexer keys."""
    if form == "model":
        return None
    return (keys_fp8 if form == "fp8" else keys_fp4)(sizes.page, config.index_head_dim)


def kinds_of_layers(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Attention kinds of the backbone layers and, last, of the MTP block if there is one."""
    return (*config.layer_kinds, *(("window",) if config.has_mtp else ()))
