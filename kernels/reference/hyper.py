"""Hyper-connections by their definitions, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.kernels.reference.heads import rms_norm


def mix(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float) -> Tensor:
    """What the gates and the matrix are made from: h [T, hc, D] float64 -> [T, M] for fn [M, hc * D]; scale
    [M]."""
    flat = rms_norm(h.flatten(1), None, norm_eps)
    return flat @ fn.double().T * scale.double() + base.double()


def gates(logits: Tensor, streams: int, iterations: int, eps: float) -> Tensor:
    """[T, (2 + hc) * hc] -> the same: pre, post, and the doubly stochastic matrix [j, k], row by row."""
    pre = torch.sigmoid(logits[:, :streams]) + eps
    post = 2 * torch.sigmoid(logits[:, streams : 2 * streams])
    comb = sinkhorn(logits[:, 2 * streams :].unflatten(1, (streams, streams)), iterations, eps)
    return torch.cat((pre, post, comb.flatten(1)), 1)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """softmax over the last dimension, then columns and rows normalised in turn: [T, hc, hc]. Columns are
    normalised `iterations` times."""
    matrix = logits.softmax(2) + eps
    matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
    return matrix


def pre(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.gpu.hyper.hyper_pre`; float64."""
    streams = h.shape[1]
    h = h.double()
    per_row = scale.repeat_interleave(torch.tensor([streams, streams, streams**2], device=h.device))
    out = gates(mix(h, fn, base, per_row, norm_eps), streams, iterations, hc_eps)
    return rms_norm(gather(h, out[:, :streams]), norm, norm_eps), out


def head(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, hc_eps: float, norm_eps: float
) -> Tensor:
    """See `weft.kernels.gpu.hyper.hyper_head`; float64."""
    h = h.double()
    logits = mix(h, fn, base, scale.expand(h.shape[1]), norm_eps)
    return rms_norm(gather(h, torch.sigmoid(logits) + hc_eps), norm, norm_eps)


def gather(h: Tensor, pre: Tensor) -> Tensor:
    """sum over k of pre_k * h_k: [T, hc, D], [T, hc] -> [T, D]."""
    out: Tensor = torch.einsum("tk,tkd->td", pre, h)
    return out


def post(h: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    """post_k * y + sum over j of comb[j, k] * h_j: h [T, hc, D], y [T, P, D] -> [T, hc, D] float64. The sum of y's
    parts is rounded as h is stored."""
    streams = h.shape[1]
    total = y.double().sum(1).to(h.dtype).double()
    post, comb = mix.double()[:, streams:].split((streams, streams**2), 1)
    out: Tensor = post[:, :, None] * total[:, None]
    return out + torch.einsum("tjk,tjd->tkd", comb.unflatten(1, (streams, streams)), h.double())


def example(
    tokens: int, device: str, *, dim: int = 4096, parts: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Arguments of `hyper_post_pre` at V4-Flash's sizes."""
    from weft.kernels.gpu.hyper import Mixer

    h = torch.randn(tokens, 4, dim, device=device).to(dtype)
    gate = torch.rand(tokens, 8, device=device) + 0.5
    matrix = sinkhorn(torch.randn(tokens, 4, 4, device=device).double(), 20, 1e-6).flatten(1).float()
    return {
        "h": h,
        "y": torch.randn(tokens, parts, dim, device=device).to(dtype),
        "mix": torch.cat((gate, matrix), 1),
        "mixer": Mixer(
            torch.randn(24, 4 * dim, device=device) * (2.0 / dim**0.5),
            torch.randn(24, device=device),
            torch.rand(3, device=device) + 0.5,
            iterations=20,
            hc_eps=1e-6,
            norm_eps=1e-6,
        ),
        "norm": torch.rand(dim, device=device) + 0.5,
    }
