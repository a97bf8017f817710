"""A plain float64 reference of DeepSeek-V4, from its equations and without any code of Weft.

Sources: the DeepSeek-V4 report (hyper-connections in section 2.2, compressed attention in 2.3) and
the inference code published with the weights. It is slow and dense (one sequence of up to about 600
tokens, whole at once), because its only duty is to be obviously right. Weights are a mapping from
the tensor names of the released files, dequantised and without `.scale`, to tensors of logical
shape.

Letters in shapes: S tokens, D hidden, H heads, d head_dim, N compressed entries, V vocabulary, hc
residual streams, nI and dI heads and width of the index. Positions count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.runtime.config import C4, ModelConfig

Weights = Mapping[str, Tensor]

FP8_GROUP = 64
FP4_GROUP = 32


@dataclass(frozen=True)
class Reference:
    """What the model computes for one sequence, and how near each token was to other choices.

    streams: [S, hc, D] after the last layer, before the head mixes them; logits: [S, V].
    margins: [S] smallest score gap that a discrete choice of this token depended on (index top-k of
    every c4a layer, expert top-k of every gated layer), inf where nothing was chosen.
    rounding: [S] with `quant_sim`, smallest distance of a value this token wrote (or asked the
    index with) to a rounding boundary, in units of the value; inf without `quant_sim`. Most values
    rounded the other way change the logits by far less than another choice does.
    """

    streams: Tensor
    logits: Tensor
    margins: Tensor
    rounding: Tensor


def reference_forward(
    config: ModelConfig, weights: Weights, ids: list[int] | Tensor, *, quant_sim: bool = False
) -> Reference:
    """The backbone over `ids` [S] from position 0.

    `quant_sim` rounds what the released model rounds: window and compressed KV to FP8, index
    queries and keys to FP4 (see `simulate_kv_fp8`, `simulate_index_fp4`); everything else stays
    float64.
    """
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    run = _Run(config, weights, torch.arange(len(tokens)), quant_sim)
    embedded = run.weight("embed.weight")[tokens]
    streams = embedded[:, None, :].expand(-1, config.hc_mult, -1)
    for layer in range(config.num_hidden_layers):
        ratio = config.compress_ratios[layer]
        hashed = layer < config.num_hash_layers
        streams = _block(run, f"layers.{layer}", ratio, streams, tokens if hashed else None)
    return run.result(streams, _head(run, "", streams))


def reference_mtp(
    config: ModelConfig,
    weights: Weights,
    streams: Tensor,
    next_ids: list[int] | Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """`reference_mtp_with_margins` without the margins: (streams [n, hc, D], logits [n, V])."""
    result = reference_mtp_with_margins(config, weights, streams, next_ids, positions)
    return result.streams, result.logits


def reference_mtp_with_margins(
    config: ModelConfig,
    weights: Weights,
    streams: Tensor,
    next_ids: list[int] | Tensor,
    positions: Tensor,
    *,
    quant_sim: bool = False,
) -> Reference:
    """The multi-token-prediction block over n rows; row i predicts the token after next_ids[i].

    streams: [n, hc, D] of the backbone at position i, or of this block at i - 1 to draft further.
    next_ids: [n] the token at position i + 1. positions: [n] i itself, ascending by one.

    Input of the block, per stream: e_proj(enorm(embed(next))) + h_proj(hnorm(stream)). It is one
    window layer, so row i depends on rows i - W + 1 .. i alone: a call that starts W - 1 rows
    earlier gives the same row as a call from position 0.
    """
    run = _Run(config, weights, positions, quant_sim)
    embedded = run.weight("embed.weight")[torch.as_tensor(next_ids, dtype=torch.int64)]
    token = run.linear("mtp.0.e_proj", run.norm("mtp.0.enorm", embedded))
    hidden = run.linear("mtp.0.h_proj", run.norm("mtp.0.hnorm", streams.double()))
    out = _block(run, "mtp.0", 0, token[:, None, :] + hidden, None)
    return run.result(out, _head(run, "mtp.0.", out))


def tainted_rows(margins: Tensor, threshold: float) -> Tensor:
    """[S] -> bool [S]: rows where this or any earlier margin is below the threshold.

    Another implementation may decide a near-tie the other way, and every later token can see the
    result. Conservative: most later rows would not notice.
    """
    return torch.cummin(margins, dim=0).values < threshold


class _Run:
    """One forward pass: its weights in float64, its positions, and the margins met so far."""

    def __init__(self, config: ModelConfig, weights: Weights, positions: Tensor, quant_sim: bool) -> None:
        self.config = config
        self.positions = positions
        self.quant_sim = quant_sim
        self._weights = weights
        self._margins = torch.full((len(positions),), math.inf, dtype=torch.float64)
        self._rounding = self._margins.clone()

    def weight(self, name: str) -> Tensor:
        return self._weights[name].double()

    def table(self, name: str) -> Tensor:
        return self._weights[name].long()

    def linear(self, name: str, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; no linear of this model has a bias."""
        return x @ self.weight(f"{name}.weight").T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms(x, self.config.rms_norm_eps) * self.weight(f"{name}.weight")

    def note_choice(self, gap: Tensor) -> None:
        """gap: [S], inf where this token had no choice."""
        self._margins = torch.minimum(self._margins, gap)

    def note_rounding(self, rows: Tensor, gap: Tensor) -> None:
        """rows: [n] row each gap [n] belongs to."""
        self._rounding[rows] = torch.minimum(self._rounding[rows], gap)

    def result(self, streams: Tensor, logits: Tensor) -> Reference:
        return Reference(streams, logits, self._margins, self._rounding)


# -- residual streams (report, section 2.2) --------------------------------------------------------


def _block(run: _Run, name: str, ratio: int, streams: Tensor, hash_ids: Tensor | None) -> Tensor:
    """One layer, [S, hc, D] -> [S, hc, D]: attention, then experts, each between two mixes."""
    pre, post, comb = _hyper_connection(run, f"{name}.hc_attn", streams)
    x = run.norm(f"{name}.attn_norm", _collapse(pre, streams))
    streams = _expand(post, comb, _attention(run, f"{name}.attn", ratio, x), streams)
    pre, post, comb = _hyper_connection(run, f"{name}.hc_ffn", streams)
    x = run.norm(f"{name}.ffn_norm", _collapse(pre, streams))
    return _expand(post, comb, _experts(run, f"{name}.ffn", x, hash_ids), streams)


def _hyper_connection(run: _Run, name: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre [S, hc], post [S, hc], comb [S, hc, hc] of one sub-layer.

    m = fn @ rms(flatten(streams)), cut into hc, hc and hc*hc (row-major [j, k]); scale has one
    entry per cut: pre = sigmoid(m s0 + b) + eps, post = 2 sigmoid(m s1 + b), comb = sinkhorn(m s2 +
    b).
    """
    hc = run.config.hc_mult
    mixed = _mix(run, streams, run.weight(f"{name}_fn"))
    scale, base = run.weight(f"{name}_scale"), run.weight(f"{name}_base")
    pre = mixed[:, :hc] * scale[0] + base[:hc]
    post = mixed[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]
    comb = mixed[:, 2 * hc :] * scale[2] + base[2 * hc :]
    return (
        torch.sigmoid(pre) + run.config.hc_eps,
        2 * torch.sigmoid(post),
        sinkhorn(comb.reshape(-1, hc, hc), run.config.hc_sinkhorn_iters, run.config.hc_eps),
    )


def sinkhorn(scores: Tensor, iterations: int, eps: float) -> Tensor:
    """[S, j, k] -> nearly doubly stochastic [S, j, k].

    Softmax over k plus eps, then columns (over j); after that `iterations - 1` times rows, then
    columns; every division is by sum + eps.
    """
    comb = torch.softmax(scores, dim=2) + eps
    comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=2, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
    return comb


def _mix(run: _Run, streams: Tensor, fn: Tensor) -> Tensor:
    """[S, hc, D] -> [S, outputs]: fn over the normalised concatenation of all streams."""
    return rms(streams.flatten(1), run.config.rms_norm_eps) @ fn.T


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """x = sum_k pre_k h_k, [S, D]."""
    return (pre[:, :, None] * streams).sum(dim=1)


def _expand(post: Tensor, comb: Tensor, y: Tensor, streams: Tensor) -> Tensor:
    """h'_k = post_k y + sum_j comb[j, k] h_j, [S, hc, D]: the sum runs over the first index."""
    return post[:, :, None] * y[:, None, :] + torch.einsum("sjk,sjd->skd", comb, streams)


def _head(run: _Run, name: str, streams: Tensor) -> Tensor:
    """[S, hc, D] -> logits [S, V]; the MTP block has its own mix and norm, `head` is shared."""
    mixed = _mix(run, streams, run.weight(f"{name}hc_head_fn"))
    scaled = mixed * run.weight(f"{name}hc_head_scale") + run.weight(f"{name}hc_head_base")
    x = _collapse(torch.sigmoid(scaled) + run.config.hc_eps, streams)
    return run.linear("head", run.norm(f"{name}norm", x))


# -- attention (report, section 2.3) ---------------------------------------------------------------


def _attention(run: _Run, name: str, ratio: int, x: Tensor) -> Tensor:
    """[S, D] -> [S, D]: all heads share one vector per position, used as key and as value."""
    config = run.config
    angles = rope_angles(config, run.positions, compressed=ratio > 0)
    query_rank = run.norm(f"{name}.q_norm", run.linear(f"{name}.wq_a", x))
    query = run.linear(f"{name}.wq_b", query_rank).unflatten(1, (-1, config.head_dim))
    query = rotate(rms(query, config.rms_norm_eps), angles[:, None, :])
    keys = rotate(run.norm(f"{name}.kv_norm", run.linear(f"{name}.wkv", x)), angles)
    keys = _round_kv(run, keys, torch.arange(len(x)))
    visible = window_visible(run.positions, config.sliding_window)
    if ratio:
        entries, chosen = _compressed_keys(run, name, ratio, x, query_rank)
        keys, visible = torch.cat([keys, entries]), torch.cat([visible, chosen], dim=1)
    mixed = sink_attention(query, keys, visible, run.weight(f"{name}.attn_sink"))
    # The values carry the rotation of their own position; turning back at the query's leaves the
    # relative one.
    return _grouped_output(run, name, rotate(mixed, -angles[:, None, :]))


def window_visible(positions: Tensor, window: int) -> Tensor:
    """bool [S, S]: the query at t sees keys t - window + 1 .. t."""
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def sink_attention(query: Tensor, keys: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """query [S, H, d], keys [K, d], visible [S, K], sink [H] -> [S, H, d].

    out = sum_k exp(q.k / sqrt(d)) k / (exp(sink) + sum_k exp(q.k / sqrt(d))): the sink has no
    value.
    """
    logits = torch.einsum("shd,kd->shk", query, keys) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(~visible[:, None, :], -math.inf)
    column = sink[None, :, None].expand(len(query), -1, 1)
    weights = torch.softmax(torch.cat([logits, column], dim=2), dim=2)[:, :, :-1]
    return torch.einsum("shk,kd->shd", weights, keys)


def _grouped_output(run: _Run, name: str, mixed: Tensor) -> Tensor:
    """[S, H, d] -> [S, D]: wo_a is block-diagonal over groups of the concatenated heads."""
    groups = run.config.o_groups
    blocks = run.weight(f"{name}.wo_a.weight").unflatten(0, (groups, -1))
    grouped = mixed.flatten(1).unflatten(1, (groups, -1))
    return run.linear(f"{name}.wo_b", torch.einsum("sgi,gri->sgr", grouped, blocks).flatten(1))


def _compressed_keys(run: _Run, name: str, ratio: int, x: Tensor, query_rank: Tensor) -> tuple[Tensor, Tensor]:
    """Entries [N, d] and which query attends which, bool [S, N].

    Entry w is complete, and visible, from token (w + 1) * ratio - 1 on. c128a attends all visible
    entries, c4a the `index_topk` best of them.
    """
    entries = _compress(run, f"{name}.compressor", ratio, run.config.head_dim, x)
    entries = _round_kv(run, entries, _completing_rows(len(entries), ratio))
    complete = torch.div(torch.arange(len(x)) + 1, ratio, rounding_mode="floor")
    visible = torch.arange(len(entries))[None, :] < complete[:, None]
    if ratio == C4:
        scores = _index_scores(run, f"{name}.indexer", x, query_rank)
        visible = _choose(run, scores, visible, run.config.index_topk)
    return entries, visible


def _compress(run: _Run, name: str, ratio: int, width: int, x: Tensor) -> Tensor:
    """[S, D] -> entries [S // ratio, width], rotated at the first position of their window.

    An entry is sum_slots softmax_slots(wgate x + ape) * wkv x, per channel. Its slots are the
    `ratio` tokens of its window; at ratio 4 the linears are twice as wide and the slots are the
    previous window's tokens with the first half of the channels, then this window's with the second
    half.
    """
    count = len(x) // ratio
    full = x[: count * ratio]
    values = run.linear(f"{name}.wkv", full).unflatten(0, (count, ratio))
    gates = run.linear(f"{name}.wgate", full).unflatten(0, (count, ratio)) + run.weight(f"{name}.ape")
    if ratio == C4:
        values, gates = _overlap(values, width, 0.0), _overlap(gates, width, -math.inf)
    pooled = (torch.softmax(gates, dim=1) * values).sum(dim=1)
    angles = rope_angles(run.config, torch.arange(count) * ratio, compressed=True)
    return rotate(run.norm(f"{name}.norm", pooled), angles)


def _overlap(windows: Tensor, width: int, before: float) -> Tensor:
    """[N, 4, 2 * width] -> [N, 8, width]; `before` stands for the window before the first."""
    first = torch.full_like(windows[:1, :, :width], before)
    previous = torch.cat([first, windows[:-1, :, :width]])
    return torch.cat([previous, windows[:, :, width:]], dim=1)


def _completing_rows(entries: int, ratio: int) -> Tensor:
    """[N]: the token that completes each entry."""
    return (torch.arange(entries) + 1) * ratio - 1


def _index_scores(run: _Run, name: str, x: Tensor, query_rank: Tensor) -> Tensor:
    """[S, N]: sum_h weights_proj(x)_h dI^-0.5 nI^-0.5 relu(q_h . k_w).

    The released model also multiplies q and k by a Hadamard matrix; being orthogonal, it shows only
    together with the rounding after it, so it is applied under `quant_sim` alone.
    """
    heads, width = run.config.index_n_heads, run.config.index_head_dim
    query = run.linear(f"{name}.wq_b", query_rank).unflatten(1, (heads, width))
    query = rotate(query, rope_angles(run.config, run.positions, compressed=True)[:, None, :])
    keys = _compress(run, f"{name}.compressor", C4, width, x)
    query = _round_index(run, query, torch.arange(len(x)))
    keys = _round_index(run, keys, _completing_rows(len(keys), C4))
    strength = run.linear(f"{name}.weights_proj", x) * width**-0.5 * heads**-0.5
    hits = torch.relu(torch.einsum("shi,wi->shw", query, keys))
    return torch.einsum("sh,shw->sw", strength, hits)


def _choose(run: _Run, scores: Tensor, allowed: Tensor, k: int) -> Tensor:
    """bool [S, N]: the k best allowed candidates of each row; of equal ones the lower index."""
    if scores.shape[1] <= k:
        return allowed
    masked = scores.masked_fill(~allowed, -math.inf)
    ranked, order = torch.sort(masked, dim=1, descending=True, stable=True)
    crowded = allowed.sum(dim=1) > k
    gap = torch.where(crowded, ranked[:, k - 1] - ranked[:, k], math.inf)
    run.note_choice(gap)
    chosen = torch.zeros_like(allowed).scatter(1, order[:, :k], True)
    return chosen & allowed


# -- experts (report, section 2.1) -----------------------------------------------------------------


def _experts(run: _Run, name: str, x: Tensor, hash_ids: Tensor | None) -> Tensor:
    """[S, D] -> [S, D]: the shared expert plus the weighted routed ones.

    s = sqrt(softplus(gate x)); weights are s of the picked experts over their sum, times the
    routing scale.
    """
    scores = torch.logaddexp(run.linear(f"{name}.gate", x), x.new_zeros(())).sqrt()
    picked = _route(run, name, scores, hash_ids)
    weights = torch.gather(scores, 1, picked)
    weights = weights / weights.sum(dim=1, keepdim=True) * run.config.routed_scaling_factor
    out = _swiglu(run, f"{name}.shared_experts", x)
    for expert in picked.unique().tolist():
        row, slot = (picked == expert).nonzero(as_tuple=True)
        y = _swiglu(run, f"{name}.experts.{expert}", x[row])
        out = out.index_add(0, row, weights[row, slot, None] * y)
    return out


def _route(run: _Run, name: str, scores: Tensor, hash_ids: Tensor | None) -> Tensor:
    """int64 [S, k]: by token id in the hash layers, else best of s + bias; bias only selects."""
    if hash_ids is not None:
        return run.table(f"{name}.gate.tid2eid")[hash_ids]
    biased = scores + run.weight(f"{name}.gate.bias")
    k = run.config.num_experts_per_tok
    chosen = _choose(run, biased, torch.ones_like(biased, dtype=torch.bool), k)
    return chosen.nonzero()[:, 1].reshape(-1, k)


def _swiglu(run: _Run, name: str, x: Tensor) -> Tensor:
    """w2(silu(min(w1 x, L)) * clamp(w3 x, -L, L)): the gate is clamped from above only."""
    limit = run.config.swiglu_limit
    gate = run.linear(f"{name}.w1", x).clamp(max=limit)
    up = run.linear(f"{name}.w3", x).clamp(min=-limit, max=limit)
    return run.linear(f"{name}.w2", gate * torch.sigmoid(gate) * up)


# -- norms and rotary positions --------------------------------------------------------------------


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension."""
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rope_angles(config: ModelConfig, positions: Tensor, *, compressed: bool) -> Tensor:
    """[n] -> [n, rope / 2]: position times the frequency of each pair.

    Window layers: theta^(-2i/rope) with `rope_theta`. Layers with a compressor use
    `compress_rope_theta` and YaRN for all their rotations; YaRN changes the frequencies only, never
    a magnitude.
    """
    rope = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    pairs = torch.arange(rope // 2, dtype=torch.float64)
    frequencies = torch.pow(torch.tensor(theta, dtype=torch.float64), -2 * pairs / rope)
    if compressed and config.rope_scaling is not None:
        keep = _yarn_keep(config, pairs, theta)
        frequencies = frequencies * keep + frequencies / config.rope_scaling.factor * (1 - keep)
    return positions.double()[:, None] * frequencies


def _yarn_keep(config: ModelConfig, pairs: Tensor, theta: float) -> Tensor:
    """[rope / 2] in 0..1: 1 for pairs that turn often over the original length, 0 for slow ones.

    Pair i turns `beta` times over L tokens at i = rope ln(L / (2 pi beta)) / (2 ln theta). The ramp
    runs from that of beta_fast, rounded down, to that of beta_slow, rounded up, within 0 .. rope -
    1.
    """
    scaling, rope = config.rope_scaling, config.qk_rope_head_dim
    assert scaling is not None

    def turning(beta: float) -> float:
        length = scaling.original_max_position_embeddings
        return rope * math.log(length / (2 * math.pi * beta)) / (2 * math.log(theta))

    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), rope - 1)
    width = high - low if high != low else 1e-3
    return 1 - ((pairs - low) / width).clamp(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (2i, 2i + 1) of the last dimensions of x [..., d] by angles [..., rope / 2]."""
    rope = 2 * angles.shape[-1]
    plain, turned = x[..., : x.shape[-1] - rope], x[..., x.shape[-1] - rope :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([plain, pairs.flatten(-2)], dim=-1)


# -- rounding of the released model ----------------------------------------------------------------


def _round_kv(run: _Run, kv: Tensor, rows: Tensor) -> Tensor:
    """kv [n, d], written by tokens rows [n]."""
    if not run.quant_sim:
        return kv
    rounded, gap = simulate_kv_fp8(kv, run.config.nope_head_dim)
    run.note_rounding(rows, gap)
    return rounded


def _round_index(run: _Run, x: Tensor, rows: Tensor) -> Tensor:
    """x [n, dI] or [n, heads, dI], written by tokens rows [n]."""
    if not run.quant_sim:
        return x
    rounded, gap = simulate_index_fp4(x)
    run.note_rounding(rows, gap.reshape(len(x), -1).amin(dim=1))
    return rounded


def simulate_kv_fp8(kv: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """kv [..., d] with dims 0..nope rounded to FP8 e4m3, and the gap to another outcome [...].

    Groups of 64 dims (the last may be shorter), scale 2^ceil(log2(max(amax, 1e-4) / 448)). The
    rotated dims stay as they are.
    """
    rounded, gap = _round_groups(kv[..., :nope], FP8_GROUP, e4m3_grid(), floor=1e-4)
    return torch.cat([rounded, kv[..., nope:]], dim=-1), gap


def simulate_index_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., dI] times the Hadamard matrix in FP4 e2m1, and the gap to another outcome [...].

    Groups of 32 dims (or one of dI when that is less), scale 2^ceil(log2(amax / 6)).
    """
    return _round_groups(x @ hadamard(x.shape[-1]), FP4_GROUP, e2m1_grid(), floor=0.0)


def hadamard(size: int) -> Tensor:
    """Normalised Sylvester matrix [size, size], size 2^n: H(2n) = [[H, H], [H, -H]] / sqrt(2)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        top, bottom = torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)
        matrix = torch.cat([top, bottom])
    assert len(matrix) == size, f"{size} is not a power of two"
    return matrix / math.sqrt(size)


def e4m3_grid() -> Tensor:
    """The 127 finite magnitudes of FP8 e4m3 (bias 7, no infinity), ascending: index = code."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor((subnormal + normal)[:127], dtype=torch.float64)


def e2m1_grid() -> Tensor:
    """The 8 magnitudes of FP4 e2m1, ascending: index = code."""
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def round_to_grid(x: Tensor, grid: Tensor) -> Tensor:
    """Nearest value of +-grid, ties to the even code; larger values to the last. Exact."""
    size = x.abs().clamp(max=grid[-1].item())
    upper = torch.searchsorted(grid, size).clamp(min=1)
    middle = (grid[upper - 1] + grid[upper]) / 2
    up = (size > middle) | ((size == middle) & (upper % 2 == 0))
    return torch.where(up, grid[upper], grid[upper - 1]).copysign(x)


def _round_groups(x: Tensor, group: int, grid: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """x [..., n] rounded group by group, and the smallest gap to another outcome [...]."""
    parts, gaps = [], [torch.full(x.shape[:-1], math.inf, dtype=torch.float64)]
    for part in x.split(group, dim=-1):
        amax = part.abs().amax(dim=-1, keepdim=True).clamp(min=floor)
        scale = _power_of_two_at_least(amax / grid[-1])
        parts.append(round_to_grid(part / scale, grid) * scale)
        gaps += [_scale_gap(amax, scale * grid[-1]), _grid_gap(part / scale, grid) * scale[..., 0]]
    return torch.cat([*parts, x[..., :0]], dim=-1), torch.stack(gaps).amin(dim=0)


def _power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) without a logarithm; 1 where x is 0."""
    mantissa, exponent = torch.frexp(x)
    exact = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(x), torch.where(x == 0, 0, exact))


def _scale_gap(amax: Tensor, top: Tensor) -> Tensor:
    """How far amax [..., 1] is from values that need another scale: above top, or up to top / 2."""
    return torch.minimum(top - amax, amax - top / 2)[..., 0].abs()


def _grid_gap(x: Tensor, grid: Tensor) -> Tensor:
    """Smallest distance of |x| [..., n] to a midpoint of the grid, [...]."""
    middles = (grid[:-1] + grid[1:]) / 2
    size = x.abs()
    after = torch.searchsorted(middles, size)
    above = (middles[after.clamp(max=len(middles) - 1)] - size).abs()
    below = (middles[(after - 1).clamp(min=0)] - size).abs()
    return torch.minimum(above, below).amin(dim=-1)
