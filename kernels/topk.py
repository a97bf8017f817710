"""Deterministic top-k: ties go to the lower index, whatever the width of the row."""

from __future__ import annotations

import torch
from torch import Tensor

_INT32_MAX = 0x7FFFFFFF
# Rows wider than this are not sorted whole.
_SORT_UP_TO = 256


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of each row, in ascending index order; -1 where none is left.

    scores: [T, N] float32, -inf marks an entry that must not be chosen; NaN is not allowed. N may be less
    than k. Returns [T, k] int64, the -1s last.
    """
    rows, width = scores.shape
    assert scores.dtype == torch.float32 and width < 1 << 31
    if width == 0:
        return torch.full((rows, k), -1, dtype=torch.int64)
    best, index = _by_sorting(scores, k) if width <= _SORT_UP_TO else _by_key(scores, k)
    index = index.masked_fill(best == float("-inf"), _INT32_MAX).sort(dim=1).values
    index = index.masked_fill_(index == _INT32_MAX, -1)
    if width < k:
        index = torch.nn.functional.pad(index, (0, k - width), value=-1)
    return index


def _by_sorting(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices; a stable sort keeps equals in index order. Fewest calls."""
    best, index = torch.sort(scores, dim=1, descending=True, stable=True)
    return best[:, :k], index[:, :k]


def _by_key(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same through torch.topk, whose choice among equals depends on the row's width: one int64 per entry that
    orders by score, then by lower index, leaves it no choice. Adding 0.0 folds -0.0 into 0.0."""
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ _INT32_MAX, bits)
    key = (ordered << 32) | (_INT32_MAX - torch.arange(scores.shape[1]))
    best = torch.topk(key, min(k, scores.shape[1]), dim=1, sorted=False).values
    index = _INT32_MAX - (best & 0xFFFFFFFF)
    return scores.gather(1, index), index
