"""Memory that nobody holds, made recognisable: reading what is not one's own shows."""

from __future__ import annotations

import torch

from weft.kernels.kv_rows import DenseRows, PagedRows, Rows
from weft.runtime.cache.capacity import kinds_of_layers
from weft.runtime.cache.pools import Pools

HUGE = 1e30


def poison(pools: Pools) -> None:
    """Overwrite every row and slot that nobody holds, but for the null row.

    Rows with NaN; slot state, which is multiplied by zero when it is not wanted, with a huge number."""
    for kind, allocator in pools.allocators.items():
        pages = torch.tensor(allocator._free, dtype=torch.int64)
        first = pools.base[kind] // pools.sizes.page
        for kv, layer in zip(pools.kv, kinds_of_layers(pools.config), strict=True):
            if kind == "window" or layer == f"{kind}a":
                ruin(kv, pages + first, pools.sizes.page)
        for keys in pools.index_keys if kind == "c4" else ():
            ruin(keys, pages, pools.sizes.page)
    slots = pools._free_slots
    for tensor in (pools.c4_tail, pools.c128_fold):
        tensor[:, slots] = HUGE
    pools.streams[slots] = HUGE


def ruin(rows: Rows, pages: torch.Tensor, size: int) -> None:
    if isinstance(rows, DenseRows):
        rows.tensor.view(-1, size, rows.tensor.shape[1])[pages] = torch.nan
    else:
        assert isinstance(rows, PagedRows)
        rows.bytes[pages] = 0xFF  # NaN as e4m3, as a power-of-two scale and as a float32 one
