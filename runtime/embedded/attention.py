"""Window, c4a and c128a attention of the training forward, and the loss that teaches the indexer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.kernels.quant import hadamard
from weft.runtime.config import C4, C128, ModelConfig
from weft.runtime.embedded.layers import Mode, Params, norm, product, rotate, unit
from weft.runtime.embedded.rounding import fp4_groups, fp8_channels, through

NEG_INF = -1e30  # finite: a row of them must not make NaN
_TAUGHT = 5  # the indexer learns from every fifth token, which is enough; odd, for all phases of c4a
_ALIGNED = 8  # channels and keys that the attention kernel takes at a time


class Turn(NamedTuple):
    """Cosines and sines [B, T, rope/2] of positions."""

    cos: Tensor
    sin: Tensor


def choose(config: ModelConfig, params: Params, x: Tensor, positions: Tensor, turn: Turn, mode: Mode) -> Tensor:
    """bool [B, T, E]: the entries that the indexer of a c4a layer chooses for each token.
    Outside `attend`, or a pass that is computed again for its gradient could choose otherwise."""
    qr = norm(product(x, params["wq_a.weight"], mode), params["q_norm.weight"], config)
    keys = _index_keys(config, params, x, positions, turn, mode)
    scores = _index_scores(config, params, x, qr, keys, turn, mode)
    visible = _visible(positions, C4)
    k = min(config.index_topk, scores.shape[-1])
    best = scores.masked_fill(~visible, -torch.inf).topk(k, -1).indices
    return torch.zeros_like(visible).scatter(-1, best, True) & visible


def attend(
    config: ModelConfig,
    params: Params,
    x: Tensor,
    positions: Tensor,
    turn: Turn,
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
    near, seen = _near(kv, positions, config)
    sink, loss = params["attn_sink"], x.new_zeros(())
    if kind == "window":
        out = _core(q, near, seen, sink, mode)
    else:
        ratio = C4 if kind == "c4a" else C128
        entries = _entries(config, params, "compressor.", x, positions, turn, ratio)
        entries = _round_kv(entries, config, mode)
        visible = _visible(positions, ratio)
        if kind == "c4a":
            some = slice(0, None, _TAUGHT)
            mass = _mass(q, near, seen, entries, visible, sink, mode)
            taught = Turn(cos[:, some], sin[:, some])
            keys = _index_keys(config, params, x.detach(), positions, turn, mode)
            scores = _index_scores(config, params, x[:, some].detach(), qr[:, some].detach(), keys, taught, mode)
            loss = _index_loss(scores, mass, visible[:, some])
        blocks = near.shape[1]
        far = entries[:, None].expand(-1, blocks, -1, -1)
        attended = (visible if chosen is None else chosen).unflatten(1, (blocks, -1))
        out = _core(q, torch.cat((near, far), 2), torch.cat((seen, attended), -1), sink, mode)
    out = rotate(out, cos[:, :, None], -sin[:, :, None])
    groups = config.o_groups
    low = params["wo_a.weight"].unflatten(0, (groups, -1)).to(mode.dtype)
    part = torch.einsum("btgi,gri->btgr", out.flatten(2).unflatten(2, (groups, -1)).to(mode.dtype), low).flatten(2)
    return product(part, params["wo_b.weight"], mode), loss


def _round_kv(rows: Tensor, config: ModelConfig, mode: Mode) -> Tensor:
    return through(rows, fp8_channels(rows, config.nope_head_dim)) if mode.rounding else rows


def _near(kv: Tensor, positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """In blocks of W tokens: the keys of each block and of the one before it, [B, T/W, 2W, d], and which of them
    each token sees, bool [B, T/W, W, 2W]."""
    window = config.sliding_window
    blocks = kv.unflatten(1, (-1, window))
    near = torch.cat((F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1], blocks), 2)
    inside = torch.arange(window, device=kv.device)
    distance = inside[:, None] - torch.arange(-window, window, device=kv.device)
    own = positions.unflatten(1, (-1, window))[..., None]
    return near, (distance >= 0) & (distance < window) & (distance <= own)


def _core(q: Tensor, keys: Tensor, seen: Tensor, sink: Tensor, mode: Mode) -> Tensor:
    """Attention of blocks of W tokens to keys that are values as well. q [B, T, H, d], keys [B, T/W, K, d], seen
    bool [B, T/W, W, K], sink [H] -> [B, T, H, d].

    All heads of a block are rows of one attention. The sink is a key of its own: it reads a channel that the other
    keys leave 0, and in which each query carries its head's sink.
    """
    batch, tokens, heads, dim = q.shape
    blocks, room = keys.shape[1], -keys.shape[2] % _ALIGNED or _ALIGNED
    scale = dim**-0.5
    more = F.pad((sink / scale)[:, None], (0, _ALIGNED - 1)).expand(batch, tokens, -1, -1)
    rows = torch.cat((q, more), -1).to(mode.dtype)
    rows = rows.reshape(batch * blocks, 1, -1, dim + _ALIGNED)
    keys = F.pad(keys.to(mode.dtype), (0, _ALIGNED, 0, room))
    keys[:, :, -room, dim] = 1
    keys = keys.flatten(0, 1)[:, None]
    open_ = torch.arange(room, device=q.device) == 0
    mask = torch.cat((seen, open_.expand(*seen.shape[:3], -1)), -1)
    mask = mask.repeat_interleave(heads, 2).flatten(0, 1)[:, None]
    bias = torch.where(mask, 0.0, -torch.inf).to(mode.dtype)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(rows, keys, keys, attn_mask=bias, scale=scale)
    return out[..., :dim].reshape(batch, tokens, heads, dim).float()


@torch.no_grad()
def _mass(
    q: Tensor, near: Tensor, seen: Tensor, entries: Tensor, visible: Tensor, sink: Tensor, mode: Mode
) -> Tensor:
    """[B, S, E], of every `_TAUGHT`th token: what each visible entry would get, summed over heads, if the token
    attended to all of them. Of all, though it may attend to few: the indexer has to learn what it left out."""
    tokens, window = q.shape[1], seen.shape[2]
    some = torch.arange(0, tokens, _TAUGHT, device=q.device)
    q = (q[:, some] * q.shape[-1] ** -0.5).to(mode.dtype)
    close = torch.einsum("bthd,btkd->bthk", q, near[:, some // window].to(mode.dtype)).float()
    close = close.masked_fill(~seen.flatten(1, 2)[:, some, None], -torch.inf)
    far = torch.einsum("bthd,bed->bthe", q, entries.to(mode.dtype)).float()
    far = far.masked_fill(~visible[:, some, None], -torch.inf)
    rest = sink[:, None].expand(*far.shape[:3], 1)
    return torch.softmax(torch.cat((close, rest, far), -1), -1)[..., close.shape[-1] + 1 :].sum(2)


def _visible(positions: Tensor, ratio: int) -> Tensor:
    """bool [B, T, E]: the entry is of the token's document and complete at the token."""
    tokens = torch.arange(positions.shape[1], device=positions.device)
    start = (tokens - positions)[..., None]
    first = tokens[::ratio]
    return (first >= start) & (first + ratio - 1 <= tokens[:, None])


def _entries(
    config: ModelConfig, params: Params, name: str, x: Tensor, positions: Tensor, turn: Turn, ratio: int
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


def _index_keys(
    config: ModelConfig, params: Params, x: Tensor, positions: Tensor, turn: Turn, mode: Mode
) -> Tensor:
    """[B, E, d] what the indexer keeps of each entry."""
    keys = _entries(config, params, "indexer.compressor.", x, positions, turn, C4)
    return _turned_over(keys, config) if mode.rounding else keys


def _index_scores(
    config: ModelConfig, params: Params, x: Tensor, qr: Tensor, keys: Tensor, turn: Turn, mode: Mode
) -> Tensor:
    """[B, S, E] the indexer's scores of some tokens, given as x and qr, with the turn of their positions."""
    heads, dim = config.index_n_heads, config.index_head_dim
    cos, sin = turn
    q = product(qr, params["indexer.wq_b.weight"], mode).unflatten(-1, (heads, dim))
    q = rotate(q, cos[:, :, None], sin[:, :, None])
    q = _turned_over(q, config) if mode.rounding else q
    hits = torch.relu(torch.einsum("bthd,bed->bthe", q.to(mode.dtype), keys.to(mode.dtype)))
    strength = product(x, params["indexer.weights_proj.weight"], mode) * (dim * heads) ** -0.5
    return torch.einsum("bthe,bth->bte", hits, strength.to(mode.dtype)).float()


def _turned_over(x: Tensor, config: ModelConfig) -> Tensor:
    x = x @ hadamard(config.index_head_dim).to(x.device)
    return through(x, fp4_groups(x))


def _index_loss(scores: Tensor, mass: Tensor, visible: Tensor) -> Tensor:
    """Mean over tokens of KL(attention mass over the visible entries || softmax of the scores over them)."""
    total = mass.sum(-1, keepdim=True)
    target = mass / total.clamp_min(1e-6)
    guess = torch.log_softmax(scores.masked_fill(~visible, NEG_INF), -1)
    gap = target * (torch.log(target.clamp_min(1e-9)) - guess)
    # A token that attends little to any entry has little to teach.
    loud = total[..., 0] / total.mean().clamp_min(1e-6)
    return (gap.masked_fill(~visible, 0).sum(-1) * loud).mean()
