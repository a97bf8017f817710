"""The two KV compressors.

c4a: entry j is a per-channel softmax over 8 rows: tokens 4j-4..4j-1 through the first half of the channels,
tokens 4j..4j+3 through the second half. Each entry is independent, so its width is fixed.
c128a: entry j pools tokens 128j..128j+127. It is folded token by token, left to right, with one rescale
formula: the running state of an open group is then the same bits wherever a chunk ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.reduce import halving_sum

NEG_INF = float("-inf")


def pool_c4(values: Tensor, scores: Tensor, first: Tensor) -> Tensor:
    """Overlapping windows of 8 rows -> one entry each.

    values, scores: [E, 8, 2d] float32, rows 0..3 the previous window, 4..7 the current one.
    first: [E] bool, True where there is no previous window (entry 0). Returns [E, d] float32.
    """
    dim = values.shape[-1] // 2
    value = torch.cat((values[:, :4, :dim], values[:, 4:, dim:]), 1)
    score = torch.cat((scores[:, :4, :dim], scores[:, 4:, dim:]), 1)
    score[:, :4].masked_fill_(first[:, None, None], NEG_INF)
    weight = torch.exp(score - score.amax(1, keepdim=True))
    return halving_sum(weight * value) / halving_sum(weight)


@dataclass(frozen=True)
class FoldPlan:
    """Which rows of a chunk each open group takes, in order.

    Groups are sorted by how many rows they take, most first: step i feeds `rows[i]` to the first len(rows[i])
    groups. slot: [G] int64 state slot of each group's sequence. fresh: [G] bool, the group starts here.
    closed: [n] int64 groups complete at the end of the chunk; opened: [m] int64 those still open.
    """

    rows: tuple[Tensor, ...]
    slot: Tensor
    fresh: Tensor
    closed: Tensor
    opened: Tensor


def fold_c128(values: Tensor, scores: Tensor, state: Tensor, plan: FoldPlan) -> Tensor:
    """Fold a chunk into the open groups; return the entries of the groups it completes.

    values, scores: [T, d] float32. state: [slots, 3, d] float32 running (max, sum, weighted sum); the slots of
    groups still open are updated in place. Returns [len(plan.closed), d] float32 in the order of plan.closed.
    """
    start = state[plan.slot]
    fresh = plan.fresh[:, None]
    top = start[:, 0].masked_fill(fresh, NEG_INF)
    total = start[:, 1].masked_fill(fresh, 0.0)
    pooled = start[:, 2].masked_fill(fresh, 0.0)
    for rows in plan.rows:
        n = rows.shape[0]
        score, value = scores[rows], values[rows]
        higher = torch.maximum(top[:n], score)
        decay = torch.exp(top[:n] - higher)
        weight = torch.exp(score - higher)
        total[:n] = total[:n] * decay + weight
        pooled[:n] = pooled[:n] * decay + weight * value
        top[:n] = higher
    if plan.opened.numel():
        kept = torch.stack((top, total, pooled), 1)
        state[plan.slot[plan.opened]] = kept[plan.opened]
    return pooled[plan.closed] / total[plan.closed]
