"""The two KV compressors.

c4a: entry j is a per-channel softmax over 8 rows: tokens 4j-4..4j-1 through the first half of the channels,
tokens 4j..4j+3 through the second half. Each entry is independent, so its width is fixed.
c128a: entry j pools tokens 128j..128j+127. It is folded token by token, left to right, with one rescale
formula: the running state of an open group is then the same bits wherever a chunk ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.kernels.linear import Array, Index
from weft.kernels.reduce import halving_sum

NEG_INF = np.float32("-inf")
# The state of a group without rows: (max, sum, weighted sum).
_FRESH = np.array([[NEG_INF], [0], [0]], np.float32)


def pool_c4(values: Array, scores: Array, first: NDArray[np.bool_]) -> Array:
    """Overlapping windows of 8 rows -> one entry each.

    values, scores: [E, 8, 2d], rows 0..3 the previous window, 4..7 the current one.
    first: [E] bool, True where there is no previous window (entry 0). Returns [E, d].
    """
    dim = values.shape[-1] // 2
    value = np.concatenate((values[:, :4, :dim], values[:, 4:, dim:]), 1)
    score = np.concatenate((scores[:, :4, :dim], scores[:, 4:, dim:]), 1)
    score[:, :4][first] = NEG_INF
    value[:, :4][first] = 0  # whatever is there, infinite or not a number, has no part in it
    score -= np.maximum.reduce(score, axis=1, keepdims=True)
    weight = np.exp(score, out=score)
    value *= weight
    return halving_sum(value) / halving_sum(weight)


@dataclass(frozen=True)
class FoldPlan:
    """Which rows of a chunk each open group takes, in order.

    Groups are sorted by how many rows they take, most first: step i feeds `rows[i]` to the first len(rows[i])
    groups. slot: [G] state slot of each group's sequence. fresh: [G] bool, the group starts here.
    closed: [n] groups complete at the end of the chunk; opened: [m] those still open.
    """

    rows: tuple[Index, ...]
    slot: Index
    fresh: NDArray[np.bool_]
    closed: Index
    opened: Index


def fold_c128(values: Array, scores: Array, state: Array, plan: FoldPlan, behind: Array | None = None) -> Array:
    """Fold a chunk into the open groups; return the entries of the groups it completes.

    values, scores: [T, d]. state: [slots, 3, d] running (max, sum, weighted sum); the slots of groups still open
    are updated in place. behind: [T, 3, d], gets the state of its group behind each row.
    Returns [len(plan.closed), d] in the order of plan.closed.
    """
    groups = state[plan.slot]
    groups[plan.fresh] = _FRESH
    for rows in plan.rows:
        score, value, open_ = scores[rows], values[rows], groups[: len(rows)]
        higher = np.maximum(open_[:, 0], score)
        decay = np.exp(open_[:, 0] - higher)
        score -= higher
        weight = np.exp(score, out=score)
        value *= weight
        open_[:, 0] = higher
        open_[:, 1:] *= decay[:, None]
        open_[:, 1] += weight
        open_[:, 2] += value
        if behind is not None:
            behind[rows] = open_
    if plan.opened.size:
        state[plan.slot[plan.opened]] = groups[plan.opened]
    done = groups[plan.closed]
    return done[:, 2] / done[:, 1]
