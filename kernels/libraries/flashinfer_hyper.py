"""FlashInfer's hyper-connections: a sublayer's output spread over four streams, and the next one's input gathered.

The mixer's product is PyTorch's, so its last bits depend on the number of tokens: this is for fast mode. Against
Weft's two launches a sublayer these are seven or so, which only many tokens make up for. Source: signatures and
kernels of flashinfer-python 0.7.2.post1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from weft.kernels.gpu.base import check, check_tensor
from weft.kernels.libraries.flashinfer import require

STREAMS = 4


class Mixer(Protocol):
    """What is read of `weft.kernels.gpu.hyper.Mixer`: fn [24, 4 * D], base [24] and scale [3], all float32."""

    @property
    def fn(self) -> Tensor: ...
    @property
    def base(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def iterations(self) -> int: ...
    @property
    def hc_eps(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...


def fits(streams: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether the library has kernels for such streams."""
    return streams == STREAMS and dim % 8 == 0 and dtype == torch.bfloat16


def pre(h: Tensor, mixer: Mixer) -> tuple[Tensor, Tensor]:
    """What a sublayer reads, before its norm: [T, D] bfloat16; and the mix [T, 24] float32 that `post` takes.

    h: [T, 4, D] bfloat16. Of the mix, post and comb are in their places; where pre would be is nothing of use.
    """
    require("mhc")
    from flashinfer import mhc

    tokens, dim = _check_streams(h)
    check_tensor("fn", mixer.fn, (6 * STREAMS, STREAMS * dim), torch.float32)
    if tokens == 0:
        return h.new_empty(0, dim), mixer.base.new_empty(0, 6 * STREAMS)
    products = h.view(tokens, -1).float() @ mixer.fn.t()
    spread, comb, gathered = mhc.mhc_pre_big_fuse_with_prenorm(
        products,
        h,
        mixer.scale,
        mixer.base,
        rms_eps=mixer.norm_eps,
        mhc_pre_eps=mixer.hc_eps,
        mhc_sinkhorn_eps=mixer.hc_eps,
        mhc_post_mult_value=2.0,
        sinkhorn_repeat=mixer.iterations,
    )
    spread = spread.view(tokens, STREAMS)
    return gathered, torch.cat((spread, spread, comb.view(tokens, -1)), 1)


def post(h: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    """post_k * y + sum over j of comb[j, k] * h_j: [T, 4, D] bfloat16.

    y: [T, P, D] bfloat16, summed over P and rounded to bfloat16. mix: [T, 24] float32: pre, post, comb.
    """
    require("mhc")
    from flashinfer import mhc

    tokens, dim = _check_streams(h)
    check_tensor("y", y, (tokens, None, dim), h.dtype)
    check_tensor("mix", mix, (tokens, 6 * STREAMS), torch.float32)
    if tokens == 0:
        return torch.empty_like(h)
    total = y[:, 0] if y.shape[1] == 1 else y.sum(1)
    spread = mix[:, STREAMS : 2 * STREAMS]
    comb = mix[:, 2 * STREAMS :].reshape(tokens, STREAMS, STREAMS)
    out: Tensor = mhc.mhc_post(total, h, spread, comb)
    return out


def _check_streams(h: Tensor) -> tuple[int, int]:
    check_tensor("h", h, (None, STREAMS, None), torch.bfloat16)
    check(h.is_contiguous() and h.shape[2] % 8 == 0, "h is contiguous, its channels a multiple of 8")
    return h.shape[0], h.shape[2]
