"""Manifold-constrained hyper-connections (mHC): several residual streams mixed per token.

A mixer reads all streams at once and gives `pre` (how a sublayer's input is gathered from the streams), `post`
(how its output is spread over them) and `comb`, a doubly stochastic matrix (Sinkhorn) that mixes the streams.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.activation import sigmoid
from weft.kernels.constant import constant
from weft.kernels.linear import Linear
from weft.kernels.norm import inverse_rms


class Mix(NamedTuple):
    """pre: [T, hc]; post: [T, hc]; comb: [T, hc, hc], all float32."""

    pre: Tensor
    post: Tensor
    comb: Tensor


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
        self.base = base
        self.scale = scale.repeat_interleave(torch.tensor([streams, streams, streams * streams]))
        self.streams = streams
        self.iterations = iterations
        self.hc_eps = hc_eps
        self.norm_eps = norm_eps

    def __call__(self, h: Tensor) -> Mix:
        """h: [T, hc, D] of any float dtype."""
        flat = h.flatten(1).float()
        mix = self.fn(flat) * inverse_rms(flat, self.norm_eps) * self.scale + self.base
        hc = self.streams
        gates = sigmoid(mix[:, : 2 * hc])
        comb = sinkhorn(mix[:, 2 * hc :].unflatten(1, (hc, hc)), self.iterations, self.hc_eps)
        return Mix(gates[:, :hc] + constant(self.hc_eps), gates[:, hc:] * constant(2.0), comb)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """softmax over the last dim, then alternate column and row normalisation.

    logits: [T, hc, hc] float32, [t, j, k]; rows are j, columns k. Columns are normalised `iterations` times.
    """
    comb = torch.exp(logits - logits.amax(-1, keepdim=True))
    # Tokens last and numpy: a hundred tiny calls, which cost numpy less than torch at one token and run over
    # contiguous tokens at many (a fifth of the time at 2,048). Sums are spelled out: the order in which a
    # reduction adds depends on the number of tokens.
    matrix = np.ascontiguousarray(comb.numpy().transpose(1, 2, 0))
    small, streams = np.float32(eps), matrix.shape[0]
    rows, columns = [matrix[j] for j in range(streams)], [matrix[:, k] for k in range(streams)]
    total = np.empty_like(rows[0])
    np.divide(matrix, _sum(columns, total)[:, None], out=matrix)
    np.add(matrix, small, out=matrix)
    for i in range(iterations):
        if i:
            np.divide(matrix, np.add(_sum(columns, total), small, out=total)[:, None], out=matrix)
        np.divide(matrix, np.add(_sum(rows, total), small, out=total), out=matrix)
    return torch.from_numpy(np.ascontiguousarray(matrix.transpose(2, 0, 1)))


def _sum(parts: list[NDArray[np.float32]], out: NDArray[np.float32]) -> NDArray[np.float32]:
    """parts[0] + parts[1] + ..., left to right, into out."""
    if len(parts) == 1:
        np.copyto(out, parts[0])
        return out
    np.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        np.add(out, part, out=out)
    return out


def gather_streams(h: Tensor, pre: Tensor) -> Tensor:
    """sum over k of pre_k * h_k: h [T, hc, D], pre [T, hc] -> [T, D] float32."""
    return (h.float() * pre[:, :, None]).sum(1)


def spread_streams(h: Tensor, y: Tensor, mix: Mix) -> Tensor:
    """post_k * y + sum over j of comb[j, k] * h_j: h [T, hc, D], y [T, D] -> [T, hc, D] in h's dtype."""
    spread = mix.post[:, :, None] * y.float()[:, None]
    return torch.baddbmm(spread, mix.comb.transpose(1, 2), h.float()).to(h.dtype)


class HeadMixer:
    """The readout's mixer: fn [hc, hc*D], base [hc], scale [1], float32; no Sinkhorn."""

    def __init__(self, fn: Linear, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> None:
        self.fn = fn
        self.base = base
        self.scale = scale
        self.hc_eps = hc_eps
        self.norm_eps = norm_eps

    def __call__(self, h: Tensor) -> Tensor:
        """h: [T, hc, D] -> [T, D] float32."""
        flat = h.flatten(1).float()
        mix = self.fn(flat) * inverse_rms(flat, self.norm_eps) * self.scale + self.base
        return gather_streams(h, sigmoid(mix) + constant(self.hc_eps))
