"""Copies by index."""

from __future__ import annotations

import torch
from torch import Tensor


def save_tails(tail: Tensor, slot: Tensor, start: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.verify.save_tails`; out: what it returns."""
    place = (start[:, None] + torch.arange(1, out.shape[2] + 1, device=start.device)) % 8
    out.copy_(tail[:, slot[:, None].long(), place.long()])


def take_back(
    tail: Tensor, saved: Tensor, fold: Tensor, behind: Tensor, streams: Tensor, h: Tensor, told: Tensor
) -> None:
    """See `weft.kernels.gpu.verify.take_back`."""
    for index, (number, slot, start, count, kept, offset) in enumerate(told.T.tolist()):
        for row in range(kept - 1, count - 1):
            tail[:, slot, (start + 1 + row) % 8] = saved[:, number, row]
        if (start + kept) % 128:
            fold[:, slot] = behind[:, offset + kept - 1]
        streams[slot] = h[index]
