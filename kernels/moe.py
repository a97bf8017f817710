"""Mixture of experts: choose, run, and sum in a fixed order per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.kernels.activation import swiglu
from weft.kernels.constant import constant
from weft.kernels.linear import Array, Index, Linear
from weft.kernels.reduce import left_fold


class Expert(NamedTuple):
    """A gated MLP: w13 [2I, D] (w1 rows first), w2 [D, I]."""

    w13: Linear
    w2: Linear


def route(scores: Array, bias: Array, k: int) -> Index:
    """The k experts with the highest biased score, the lower of equals, in ascending order: [T, E] -> [T, k]."""
    best = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :k]
    return np.sort(best, axis=1)


def expert_weights(scores: Array, experts: Index, scaling: float) -> Array:
    """scores of the chosen experts, normalised to sum 1, times `scaling`: [T, k]."""
    tokens, width = scores.shape
    chosen: Array = scores.ravel()[experts + np.arange(0, tokens * width, width)[:, None]]
    chosen /= left_fold(chosen[:, :, None])
    chosen *= constant(scaling)
    return chosen


def run_experts(
    x: Array, experts: Index, weights: Array, modules: Sequence[Expert], shared: Expert, limit: float
) -> Array:
    """The chosen experts' weighted outputs, added in ascending expert order, plus the shared expert's.

    x: [T, D]; experts: [T, k] ascending per token, as the sum's order must not depend on how they were
    chosen; weights: [T, k], applied before w2. Returns [T, D].
    """
    tokens, k = experts.shape
    flat = experts.ravel()
    order = flat.argsort(kind="stable")
    # Rows in expert order; only the products go expert by expert, everything between them is one call.
    rows = x[order // k]
    used, start = [], 0
    for module, count in zip(modules, np.bincount(flat, minlength=len(modules)).tolist(), strict=True):
        if count:
            used.append((module, slice(start, start + count)))
            start += count
    opened = np.concatenate([*(module.w13.array(rows[part]) for module, part in used), shared.w13.array(x)])
    inner = opened.shape[1] // 2
    hidden = swiglu(opened[:, :inner], opened[:, inner:], limit)
    hidden[: tokens * k] *= weights.ravel()[order][:, None]
    closed = np.empty((tokens, k, x.shape[1]), np.float32)
    closed.reshape(tokens * k, -1)[order] = np.concatenate([m.w2.array(hidden[part]) for m, part in used])
    out = left_fold(closed)
    out += shared.w2.array(hidden[tokens * k :])
    return out
