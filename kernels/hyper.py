"""Manifold-constrained hyper-connections (mHC): several residual streams mixed per token.

A mixer reads all streams at once and gives `pre` (how a sublayer's input is gathered from the streams), `post`
(how its output is spread over them) and `comb`, a doubly stochastic matrix (Sinkhorn) that mixes the streams.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from weft.kernels.activation import sigmoid_
from weft.kernels.constant import constant
from weft.kernels.linear import Array, Linear
from weft.kernels.norm import inverse_rms


class Mix(NamedTuple):
    """pre: [T, hc]; post: [T, hc]; comb: [T, hc, hc]."""

    pre: Array
    post: Array
    comb: Array


class Mixer:
    """One mixer: fn [(2+hc)*hc, hc*D], base [(2+hc)*hc], scale [3], all float32."""

    def __init__(
        self,
        fn: Linear,
        base: Tensor,
        scale: Tensor,
        *,
        streams: int,
        iterations: int,
        hc_eps: float,
        norm_eps: float,
    ) -> None:
        self.fn = fn
        self.streams = streams
        self.iterations = iterations
        self.hc_eps = hc_eps
        self.norm_eps = norm_eps
        # The gates are computed negated, as their sigmoid wants them: pre = sigmoid + hc_eps, post = 2 * sigmoid.
        signs = np.repeat(np.array([-1, -1, 1], np.float32), [streams, streams, streams * streams])
        self.scale = signs * np.repeat(scale.numpy(), [streams, streams, streams * streams])
        self.base = signs * base.numpy()
        self._tops = np.repeat(np.array([1, 2], np.float32), streams)
        self._floors = np.repeat(np.array([hc_eps, 0], np.float32), streams)

    def __call__(self, h: Array) -> Mix:
        """h: [T, hc, D]."""
        hc = self.streams
        flat = h.reshape(len(h), -1)
        mix = self.fn.array(flat) * inverse_rms(flat, self.norm_eps)
        mix *= self.scale
        mix += self.base
        gates = sigmoid_(mix[:, : 2 * hc], self._tops)
        gates += self._floors
        comb = sinkhorn(mix[:, 2 * hc :].reshape(-1, hc, hc), self.iterations, self.hc_eps)
        return Mix(gates[:, :hc], gates[:, hc:], comb)


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """softmax over the last dim, then alternate column and row normalisation.

    logits: [T, hc, hc] float32, [t, j, k]; rows are j, columns k. Columns are normalised `iterations` times.
    """
    # Tokens last, so that at many each call runs over contiguous tokens.
    matrix = logits.transpose(1, 2, 0).copy()
    matrix -= np.maximum.reduce(matrix, axis=1, keepdims=True)
    np.exp(matrix, out=matrix)
    small, add, divide = constant(eps), np.add, np.divide
    sums_of_rows, of_rows = _additions(matrix.swapaxes(0, 1))
    sums_of_columns, of_columns = _additions(matrix)
    by_row = of_rows[:, None]
    for i in range(iterations):
        for x, y, out in sums_of_rows:
            add(x, y, out)
        if i:
            add(of_rows, small, of_rows)
        divide(matrix, by_row, matrix)
        if not i:
            add(matrix, small, matrix)
        for x, y, out in sums_of_columns:
            add(x, y, out)
        add(of_columns, small, of_columns)
        divide(matrix, of_columns, matrix)
    return np.ascontiguousarray(matrix.transpose(2, 0, 1))


def _additions(parts: Array) -> tuple[list[tuple[Array, Array, Array]], Array]:
    """Calls (x, y, out) that sum `parts` over the first dimension, and where the sum will be.

    Spelled out because the order in which a reduction adds depends on the number of tokens.
    """
    if len(parts) % 2:
        total = np.zeros_like(parts[0])
        first = (parts[0], np.zeros_like(total), total)
        return [first, *((total, part, total) for part in parts[1:])], total
    half = len(parts) // 2
    folded = np.empty((half, *parts.shape[1:]), np.float32)
    step = (parts[:half], parts[half:], folded)
    if half == 1:
        return [step], folded[0]
    rest, total = _additions(folded)
    return [step, *rest], total


def gather_streams(h: Array, pre: Array) -> Array:
    """sum over k of pre_k * h_k: h [T, hc, D], pre [T, hc] -> [T, D]."""
    out: Array = np.matmul(pre[:, None], h)[:, 0]
    return out


def spread_streams(h: Array, y: Array, mix: Mix) -> Array:
    """post_k * y + sum over j of comb[j, k] * h_j: h [T, hc, D], y [T, D] -> [T, hc, D]."""
    out: Array = np.matmul(mix.comb.swapaxes(1, 2), h)
    out += mix.post[:, :, None] * y[:, None]
    return out


class HeadMixer:
    """The readout's mixer: fn [hc, hc*D], base [hc], scale [1], float32; no Sinkhorn."""

    def __init__(self, fn: Linear, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> None:
        self.fn = fn
        self.base = base.numpy()
        self.scale = scale.numpy()
        self.hc_eps = hc_eps
        self.norm_eps = norm_eps

    def __call__(self, h: Array) -> Array:
        """h: [T, hc, D] -> [T, D]."""
        flat = h.reshape(len(h), -1)
        mix = self.fn.array(flat) * inverse_rms(flat, self.norm_eps)
        mix *= -self.scale
        mix -= self.base
        gates = sigmoid_(mix, constant(1.0))
        gates += constant(self.hc_eps)
        return gather_streams(h, gates)
