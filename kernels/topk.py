"""Deterministic top-k: ties go to the lower index, whatever the width of the row."""

from __future__ import annotations

import torch
from torch import Tensor

_INT32_MAX = 0x7FFFFFFF


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of each row, in ascending index order; -1 where none is left.

    scores: [T, N] float32, -inf marks an entry that must not be chosen; NaN is not allowed. N may be less
    than k. Returns [T, k] int64, the -1s last.
    """
    rows, width = scores.shape
    assert scores.dtype == torch.float32 and width < 1 << 31
    if width == 0:
        return torch.full((rows, k), -1, dtype=torch.int64)
    # One int64 per entry that orders by score, then by lower index: keys are unique, so torch.topk, whose
    # choice among equals depends on the row's width, has no choice left. Adding 0.0 folds -0.0 into 0.0.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ _INT32_MAX, bits)
    key = (ordered << 32) | (_INT32_MAX - torch.arange(width))
    best = torch.topk(key, min(k, width), dim=1, sorted=False).values
    index = _INT32_MAX - (best & 0xFFFFFFFF)
    index = torch.where(best >= _KEY_OF_MINUS_INF_END, index, _INT32_MAX)
    index = index.sort(dim=1).values
    index = torch.where(index == _INT32_MAX, -1, index)
    if width < k:
        index = torch.nn.functional.pad(index, (0, k - width), value=-1)
    return index


def _ordered_minus_inf() -> int:
    bits = int(torch.tensor(float("-inf")).view(torch.int32))
    return bits ^ _INT32_MAX


# Keys below this belong to -inf scores.
_KEY_OF_MINUS_INF_END = (_ordered_minus_inf() + 1) << 32
