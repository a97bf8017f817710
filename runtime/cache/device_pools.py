"""Pools on the device of the GPU ops: pages in their byte layouts, and copies of one launch for all layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weft.kernels.gpu.copies import PageTable, SlotTable, copy_pages, copy_slots
from weft.kernels.kv_rows import PagedRows, Rows
from weft.runtime.cache.capacity import KINDS, IndexFormat, KvFormat, PageKind, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.config import ModelConfig
from weft.runtime.errors import ConfigError


class DevicePools(Pools):
    """`pages` and `key_pages` are `kv` and `index_keys`, of which the ops read bytes and layout."""

    def __init__(
        self,
        config: ModelConfig,
        sizes: PoolSizes,
        dtype: torch.dtype,
        *,
        kv_format: KvFormat,
        index_format: IndexFormat,
        device: torch.device | str,
    ) -> None:
        for name, form in (("kv_format", kv_format), ("index_format", index_format)):
            if form == "model":
                raise ConfigError(name, form, "the GPU ops read rows in the released layouts")
        super().__init__(config, sizes, dtype, kv_format=kv_format, index_format=index_format, device=device)
        self.pages = [_paged(rows) for rows in self.kv]
        self.key_pages = [_paged(rows) for rows in self.index_keys]
        page = sizes.page
        of_kind: dict[PageKind, list[Tensor]] = {
            kind: [_paged(rows).bytes[self.base[kind] // page :] for rows in self.kv_of(kind)] for kind in KINDS
        }
        of_kind["c4"] += [keys.bytes for keys in self.key_pages]
        self._tables = {kind: PageTable.of(tensors) for kind, tensors in of_kind.items() if tensors}
        self._state = SlotTable.of_state(self.c4_tail, self.c128_fold, self.streams)

    def _copy_pages(self, kind: PageKind, source: Tensor, target: Tensor) -> int:
        table = self._tables.get(kind)
        if table is None:
            return 0
        copy_pages(table, *self.numbers(torch.stack((source, target)).numpy()))
        return len(source) * table.nbytes

    def _copy_raw(self, source: int, target: int) -> None:
        copy_slots(self._state, *self.numbers(np.array([[source], [target]])))


def _paged(rows: Rows) -> PagedRows:
    assert isinstance(rows, PagedRows)
    return rows
