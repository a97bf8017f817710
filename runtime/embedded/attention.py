"""Window, c4a and c128a attention of the training forward, and the loss that teaches the indexer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.quant import hadamard
from weft.runtime.config import C4, C128, ModelConfig
from weft.runtime.embedded.layers import Mode, Params, norm, product, rotate, unit
from weft.runtime.embedded.rounding import fp4_groups, fp8_channels, through

NEG_INF = -1e30  # finite: a row of them must not make NaN


def choose(config: ModelConfig, params: Params, x: Tensor, positions: Tensor, turn: Any, mode: Mode) -> Tensor:
    """bool [B, T, E]: the entries that the indexer of a c4a layer chooses for each token.

    A function of its own, because a compiler may compute parts of `attend` again for its gradient, and rounded
    otherwise they can choose otherwise: an entry that was not attended to may then outweigh all others.
    """
    qr = norm(product(x, params["wq_a.weight"], mode), params["q_norm.weight"], config)
    scores = _index_scores(config, params, x, qr, positions, turn, mode)
    visible = _visible(positions, C4)
    k = min(config.index_topk, scores.shape[-1])
    best = scores.masked_fill(~visible, -torch.inf).topk(k, -1).indices
    return torch.zeros_like(visible).scatter(-1, best, True) & visible


def attend(
    config: ModelConfig,
    params: Params,
    x: Tensor,
    positions: Tensor,
    turn: Any,
    kind: str,
    chosen: Tensor | None,
    mode: Mode,
) -> tuple[Tensor, Tensor]:
    """x [B, T, D] normed -> [B, T, D], and the indexer's loss (0 but in c4a layers). chosen: what `choose` gave;
    None attends to every visible entry."""
    heads, dim = config.num_attention_heads, config.head_dim
    cos, sin = turn
    qr = norm(product(x, params["wq_a.weight"], mode), params["q_norm.weight"], config)
    q = unit(product(qr, params["wq_b.weight"], mode).unflatten(-1, (heads, dim)), config)
    q = rotate(q, cos[:, :, None], sin[:, :, None])
    kv = norm(product(x, params["wkv.weight"], mode), params["kv_norm.weight"], config)
    kv = _round_kv(rotate(kv, cos, sin), config, mode)
    logits, near = _window_logits(q, kv, positions, config, mode)
    loss = x.new_zeros(())
    entries = None
    if kind != "window":
        ratio = C4 if kind == "c4a" else C128
        entries = _entries(config, params, "compressor.", x, positions, turn, ratio)
        entries = _round_kv(entries, config, mode)
        visible = _visible(positions, ratio)
        far_logits = torch.einsum("bthd,bed->bthe", q.to(mode.dtype), entries.to(mode.dtype)).float() * dim**-0.5
        if kind == "c4a":
            scores = _index_scores(config, params, x.detach(), qr.detach(), positions, turn, mode)
            loss = _index_loss(scores, _mass(logits, far_logits, params["attn_sink"], visible), visible)
        attended = visible if chosen is None else chosen
        logits = torch.cat((logits, far_logits.masked_fill(~attended[:, :, None], NEG_INF)), -1)
    sink = params["attn_sink"][:, None].expand(*logits.shape[:3], 1)
    weights = torch.softmax(torch.cat((logits, sink), -1), -1)
    out = _window_values(weights[..., : 2 * config.sliding_window], near, mode)
    if entries is not None:
        far = weights[..., 2 * config.sliding_window : -1]
        out = out + torch.einsum("bthe,bed->bthd", far.to(mode.dtype), entries.to(mode.dtype)).float()
    out = rotate(out, cos[:, :, None], -sin[:, :, None])
    groups = config.o_groups
    low = params["wo_a.weight"].unflatten(0, (groups, -1)).to(mode.dtype)
    part = torch.einsum("btgi,gri->btgr", out.flatten(2).unflatten(2, (groups, -1)).to(mode.dtype), low).flatten(2)
    return product(part, params["wo_b.weight"], mode), loss


def _round_kv(rows: Tensor, config: ModelConfig, mode: Mode) -> Tensor:
    return through(rows, fp8_channels(rows, config.nope_head_dim)) if mode.rounding else rows


def _window_logits(
    q: Tensor, kv: Tensor, positions: Tensor, config: ModelConfig, mode: Mode
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, H, 2W] over the keys of a token's own block of W tokens and of the one before it, and those
    keys, [B, T/W, 2W, d]."""
    window = config.sliding_window
    blocks = kv.unflatten(1, (-1, window))
    near = torch.cat((F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1], blocks), 2)
    grouped = q.unflatten(1, (-1, window))
    logits = torch.einsum("bnqhd,bnkd->bnqhk", grouped.to(mode.dtype), near.to(mode.dtype)).float()
    logits = logits.flatten(1, 2) * config.head_dim**-0.5
    inside = torch.arange(window, device=q.device)
    distance = inside[:, None] - torch.arange(-window, window, device=q.device)
    distance = distance.repeat(kv.shape[1] // window, 1)
    seen = (distance >= 0) & (distance < window) & (distance <= positions[..., None])
    return logits.masked_fill(~seen[:, :, None], NEG_INF), near


def _window_values(weights: Tensor, near: Tensor, mode: Mode) -> Tensor:
    grouped = weights.unflatten(1, (near.shape[1], -1))
    return torch.einsum("bnqhk,bnkd->bnqhd", grouped.to(mode.dtype), near.to(mode.dtype)).float().flatten(1, 2)


def _visible(positions: Tensor, ratio: int) -> Tensor:
    """bool [B, T, E]: the entry is of the token's document and complete at the token."""
    tokens = torch.arange(positions.shape[1], device=positions.device)
    start = (tokens - positions)[..., None]
    first = tokens[::ratio]
    return (first >= start) & (first + ratio - 1 <= tokens[:, None])


def _entries(
    config: ModelConfig, params: Params, name: str, x: Tensor, positions: Tensor, turn: Any, ratio: int
) -> Tensor:
    """Compressed entries [B, T/ratio, d] of one compressor, rotated at the first position of their groups."""
    values = F.linear(x, params[f"{name}wkv.weight"]).unflatten(1, (-1, ratio))
    gates = F.linear(x, params[f"{name}wgate.weight"]).unflatten(1, (-1, ratio)) + params[f"{name}ape"]
    if ratio == C4:
        width = values.shape[-1] // 2
        fresh = (positions[:, ::ratio] == 0)[..., None, None]
        before = F.pad(gates[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)).masked_fill(fresh, NEG_INF)
        gates = torch.cat((before, gates[..., width:]), 2)
        values = torch.cat((F.pad(values[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)), values[..., width:]), 2)
    pooled = (torch.softmax(gates, 2) * values).sum(2)
    cos, sin = turn
    return rotate(norm(pooled, params[f"{name}norm.weight"], config), cos[:, ::ratio], sin[:, ::ratio])


def _index_scores(
    config: ModelConfig, params: Params, x: Tensor, qr: Tensor, positions: Tensor, turn: Any, mode: Mode
) -> Tensor:
    """[B, T, E] the indexer's scores."""
    heads, dim = config.index_n_heads, config.index_head_dim
    cos, sin = turn
    q = product(qr, params["indexer.wq_b.weight"], mode).unflatten(-1, (heads, dim))
    q = rotate(q, cos[:, :, None], sin[:, :, None])
    keys = _entries(config, params, "indexer.compressor.", x, positions, turn, C4)
    if mode.rounding:
        turn_over = hadamard(dim).to(x.device)
        q, keys = q @ turn_over, keys @ turn_over
        q, keys = through(q, fp4_groups(q)), through(keys, fp4_groups(keys))
    hits = torch.relu(torch.einsum("bthd,bed->bthe", q.to(mode.dtype), keys.to(mode.dtype)))
    strength = product(x, params["indexer.weights_proj.weight"], mode) * (dim * heads) ** -0.5
    scores: Tensor = (hits.float() * strength[..., None]).sum(2)
    return scores


@torch.no_grad()
def _mass(near: Tensor, far: Tensor, sink: Tensor, visible: Tensor) -> Tensor:
    """[B, T, E]: what each visible entry would get, summed over heads, if the token attended to all of them.

    Of all, though the token may attend to few: the indexer has to learn what it left out, too.
    """
    far = far.masked_fill(~visible[:, :, None], NEG_INF)
    all_logits = torch.cat((near, far, sink[:, None].expand(*near.shape[:3], 1)), -1)
    return torch.softmax(all_logits, -1)[..., near.shape[-1] : -1].sum(2)


def _index_loss(scores: Tensor, mass: Tensor, visible: Tensor) -> Tensor:
    """Mean over tokens of KL(attention mass over the visible entries || softmax of the scores over them)."""
    total = mass.sum(-1, keepdim=True)
    target = mass / total.clamp_min(1e-6)
    guess = torch.log_softmax(scores.masked_fill(~visible, NEG_INF), -1)
    gap = target * (torch.log(target.clamp_min(1e-9)) - guess)
    # A token that attends little to any entry has little to teach.
    loud = total[..., 0] / total.mean().clamp_min(1e-6)
    return (gap.masked_fill(~visible, 0).sum(-1) * loud).mean()
