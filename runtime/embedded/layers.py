"""The parts of a block without attention, on flattened tokens: norms, products, hyper-connections, experts.

Letters in shapes: N tokens, D hidden, hc streams, I inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.runtime.config import ModelConfig

Params = Mapping[str, Tensor]


class Mode(NamedTuple):
    """How a pass computes. dtype: of the wide products. sparse: c4a layers attend to the indexer's choice, not to
    every entry. rounding: KV rows and indexer vectors are rounded as the release rounds them. recompute: attention
    is computed again for its gradient, which takes less memory."""

    dtype: torch.dtype = torch.float32
    sparse: bool = True
    rounding: bool = False
    recompute: bool = False


def product(x: Tensor, weight: Tensor, mode: Mode) -> Tensor:
    """[..., I] by [O, I] in the mode's dtype -> [..., O] float32."""
    return F.linear(x.to(mode.dtype), weight.to(mode.dtype)).float()


def norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return unit(x, config) * weight


def unit(x: Tensor, config: ModelConfig) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)


def enter(
    config: ModelConfig, h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [N, hc, D] -> a sublayer's normed input [N, D], and how its output is spread: post [N, hc] and comb
    [N, hc, hc]."""
    hc = config.hc_mult
    mixed = F.linear(unit(h.flatten(1), config), fn)
    pre = torch.sigmoid(mixed[:, :hc] * scale[0] + base[:hc]) + config.hc_eps
    post = 2 * torch.sigmoid(mixed[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    comb = (mixed[:, 2 * hc :] * scale[2] + base[2 * hc :]).unflatten(1, (hc, hc))
    return norm(_gather(h, pre), weight, config), post, _sinkhorn(comb, config)


def leave(h: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post_k y + sum over j of comb[j, k] h_j: [N, hc, D] and [N, D] -> [N, hc, D]."""
    return post[..., None] * y[:, None] + (comb[..., None] * h[:, :, None]).sum(1)


def head_input(h: Tensor, params: Params, config: ModelConfig) -> Tensor:
    """Streams [N, hc, D] -> normed [N, D]; `params` of the model, or of the MTP block."""
    mixed = F.linear(unit(h.flatten(1), config), params["hc_head_fn"])
    pre = torch.sigmoid(mixed * params["hc_head_scale"] + params["hc_head_base"]) + config.hc_eps
    return norm(_gather(h, pre), params["norm.weight"], config)


def _gather(h: Tensor, pre: Tensor) -> Tensor:
    return (h * pre[..., None]).sum(1)


def _sinkhorn(scores: Tensor, config: ModelConfig) -> Tensor:
    eps = config.hc_eps
    comb = torch.softmax(scores, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def experts(
    config: ModelConfig, params: Params, x: Tensor, picks: Tensor | None, mode: Mode
) -> tuple[Tensor, Tensor]:
    """[N, D] -> [N, D], and the share of tokens that each expert got. picks: [N, k] of a hash layer.

    All experts run over all tokens, with weight 0 where not chosen: at this size cheaper than sorting tokens.
    """
    count = config.n_routed_experts
    scores = torch.sqrt(F.softplus(F.linear(x, params["gate.weight"])))
    if picks is None:
        picks = (scores.detach() + params["gate.bias"]).topk(config.num_experts_per_tok, -1).indices
    chosen = torch.zeros_like(scores).scatter(-1, picks, 1.0)
    weight = scores * chosen
    weight = weight / weight.sum(-1, keepdim=True) * config.routed_scaling_factor
    opened = product(x, params["experts.w13"].flatten(0, 2), mode)
    hidden = _swiglu(opened.unflatten(-1, (count, -1)), config.swiglu_limit) * weight[..., None]
    # w2 is [E, D, I]: summing over experts and their inner channels at once is one product.
    out = product(hidden.flatten(1), params["experts.w2"].transpose(0, 1).flatten(1), mode)
    shared = _swiglu(product(x, params["shared_experts.w13"].flatten(0, 1), mode), config.swiglu_limit)
    return out + product(shared, params["shared_experts.w2"], mode), chosen.mean(0)


def _swiglu(opened: Tensor, limit: float) -> Tensor:
    """[..., 2I], gate first -> [..., I]."""
    gate, up = opened.chunk(2, -1)
    return F.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the last channels of x in pairs (2i, 2i + 1); cos and sin [..., pairs] broadcast over x."""
    pairs = cos.shape[-1]
    head, tail = x[..., : -2 * pairs], x[..., -2 * pairs :]
    even, odd = tail[..., 0::2], tail[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((head, turned), -1)
