"""Hyper-connections and norms in torch: what `weft.kernels.hyper` and `weft.kernels.norm` say in numpy.

Written with functions that give an element the same bits wherever it stands: exp and arithmetic, not sigmoid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.weights import DeviceWeights


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): [..., D] float32 -> [..., 1]."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D] of any float dtype, [D] -> [..., D] float32."""
    wide = x.float()
    return wide * inverse_rms(wide, eps) * weight


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


class Mix(NamedTuple):
    """pre: [T, hc]; post: [T, hc]; comb: [T, hc, hc]."""

    pre: Tensor
    post: Tensor
    comb: Tensor


class Mixer:
    """One mixer: fn [(2+hc)*hc, hc*D], base [(2+hc)*hc], scale [3], all float32."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, name: str) -> None:
        self.streams = hc = config.hc_mult
        self.iterations = config.hc_sinkhorn_iters
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = weights.wide_linear(f"{name}_fn")
        self.base = weights.wide(f"{name}_base")
        counts = torch.tensor([hc, hc, hc * hc], device=weights.device)
        self.scale = weights.wide(f"{name}_scale").repeat_interleave(counts)

    def __call__(self, h: Tensor) -> Mix:
        """h: [T, hc, D]."""
        hc = self.streams
        flat = h.flatten(1).float()
        mix = self.fn(flat) * inverse_rms(flat, self.norm_eps) * self.scale + self.base
        pre = sigmoid(mix[:, :hc]) + self.hc_eps
        post = 2.0 * sigmoid(mix[:, hc : 2 * hc])
        return Mix(pre, post, sinkhorn(mix[:, 2 * hc :].unflatten(1, (hc, hc)), self.iterations, self.hc_eps))


class HeadMixer:
    """The readout's mixer: fn [hc, hc*D], base [hc], scale [1], float32; no Sinkhorn."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = weights.wide_linear("hc_head_fn")
        self.base, self.scale = weights.wide("hc_head_base"), weights.wide("hc_head_scale")

    def __call__(self, h: Tensor) -> Tensor:
        """[T, hc, D] -> [T, D] float32."""
        flat = h.flatten(1).float()
        mix = self.fn(flat) * inverse_rms(flat, self.norm_eps) * self.scale + self.base
        return gather_streams(h, sigmoid(mix) + self.hc_eps)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """softmax over the last dim, then alternate column and row normalisation: [T, hc, hc] float32, rows first.
    Columns are normalised `iterations` times."""
    matrix = torch.exp(logits - logits.amax(2, keepdim=True))
    matrix = matrix / _total(matrix, 2) + eps
    matrix = matrix / (_total(matrix, 1) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (_total(matrix, 2) + eps)
        matrix = matrix / (_total(matrix, 1) + eps)
    return matrix


def _total(x: Tensor, dim: int) -> Tensor:
    """Sum over a dimension, which stays. On CPUs in an order that the number of tokens does not change."""
    if x.device.type != "cpu":
        return x.sum(dim, keepdim=True)
    total = x.narrow(dim, 0, 1)
    for i in range(1, x.shape[dim]):
        total = total + x.narrow(dim, i, 1)
    return total


def gather_streams(h: Tensor, pre: Tensor) -> Tensor:
    """sum over k of pre_k * h_k: [T, hc, D], [T, hc] -> [T, D] float32."""
    out = pre[:, 0, None] * h[:, 0]
    for k in range(1, h.shape[1]):
        out = torch.addcmul(out, pre[:, k, None], h[:, k].float())
    return out


def spread_streams(h: Tensor, y: Tensor, mix: Mix) -> Tensor:
    """post_k * y + sum over j of comb[j, k] * h_j: [T, hc, D], [T, D] -> [T, hc, D] in the dtype of h."""
    out = mix.comb[:, 0, :, None] * h[:, 0, None]
    for j in range(1, h.shape[1]):
        out = torch.addcmul(out, mix.comb[:, j, :, None], h[:, j, None].float())
    return torch.addcmul(out, mix.post[:, :, None], y[:, None].float()).to(h.dtype)
