"""Copies of pages and slots, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def copy_pages(tensors: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """See `weft.kernels.gpu.copies.copy_pages`."""
    for old, new in zip(source.tolist(), target.tolist(), strict=True):
        if old >= 0 and new >= 0:
            for tensor in tensors:
                tensor[new] = tensor[old]


def example(copies: int, device: str, *, layers: int = 21, page_bytes: int = 37440) -> dict[str, Any]:
    """Arguments of `copy_pages` of V4-Flash's c4a layers: pages 1..n to n+1..2n."""
    from weft.kernels.gpu.copies import PageTable

    pools = [
        torch.randint(0, 256, (2 * copies + 1, page_bytes), dtype=torch.uint8, device=device)
        for _ in range(layers)
    ]
    number = torch.arange(1, copies + 1, dtype=torch.int32, device=device)
    return {"pools": PageTable.of(pools), "source": number, "target": number + copies}


def example_slots(copies: int, device: str) -> dict[str, Any]:
    """Arguments of `copy_slots` at V4-Flash's sizes: 21 c4a and 20 c128a layers."""
    from weft.kernels.gpu.copies import SlotTable

    slots = 2 * copies
    tail = torch.randn(21, slots, 8, 2560, device=device)
    fold = torch.randn(20, slots, 3, 512, device=device)
    streams = torch.randn(slots, 4, 4096, device=device).bfloat16()
    number = torch.arange(copies, dtype=torch.int32, device=device)
    return {"state": SlotTable.of_state(tail, fold, streams), "source": number, "target": number + copies}
