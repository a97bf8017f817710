"""Sampling by its definition, row by row, with a sort. Slow, on any device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.sampling import Masks, Refused, RowSettings, Scores

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def sample_rows(scores: Scores, settings: RowSettings, refused: Refused | None) -> Tensor:
    """As the wrapper of this name."""
    out = []
    for i in range(len(scores.logits)):
        row = adjusted_row(scores, i)
        if float(settings.temperature[i]) > 0:
            weight = filtered_row(row, settings, i)
            slot = -1 if refused is None else int(refused.slots[i])
            if refused is not None and slot >= 0:
                more = (torch.softmax(weight, 0) - refused.odds[slot]).clamp_min(0)
                weight = more.log() if bool(more.any()) else weight
            row = weight - (-uniform(int(settings.keys[i]), row).log()).log()
        out.append(first_best(row))
    return torch.tensor(out, dtype=torch.int32, device=scores.logits.device)


def distribution_rows(scores: Scores, settings: RowSettings) -> Tensor:
    """As the wrapper of this name."""
    out = torch.zeros(scores.logits.shape, dtype=torch.float64, device=scores.logits.device)
    for i in range(len(out)):
        row = adjusted_row(scores, i)
        if float(settings.temperature[i]) > 0:
            out[i] = torch.softmax(filtered_row(row, settings, i), 0)
        else:
            out[i, first_best(row)] = 1
    return out


def judge_rows(scores: Scores, settings: RowSettings, drafts: Tensor, odds: Tensor) -> Tensor:
    """As the wrapper of this name."""
    chosen = drafts.long()[:, None]
    ratio = distribution_rows(scores, settings).gather(1, chosen)[:, 0] / odds
    one = scores.logits[0, :1]
    noise = torch.cat([uniform(key, one) for key in settings.keys.tolist()])
    return torch.where(noise < ratio, drafts, -1)


def draft_matches(drawn: Tensor, drafts: Tensor, starts: Tensor) -> Tensor:
    """As the wrapper of this name."""
    out = []
    bounds = starts.tolist()
    for first, last in pairwise(bounds):
        count = 0
        while first + count < last and int(drawn[first + count]) == int(drafts[first + count]):
            count += 1
        out.append(count)
    return torch.tensor(out, dtype=torch.int32, device=drawn.device)


def apply_bitmask(logits: Tensor, masks: Masks) -> None:
    """As the wrapper of this name."""
    for i, slot in enumerate(masks.slots.tolist()):
        if slot >= 0:
            logits[i].masked_fill_(~allowed_row(masks, slot, logits.shape[1]), -torch.inf)


def allowed_row(masks: Masks, slot: int, width: int) -> Tensor:
    """[V] bool."""
    token = torch.arange(width, device=masks.words.device)
    return (masks.words[slot][token // 32] >> (token % 32)) & 1 == 1


def adjusted_row(scores: Scores, i: int) -> Tensor:
    """[V] float32 after edits and mask."""
    row = scores.logits[i].clone()
    edits, masks = scores.edits, scores.masks
    slot = -1 if edits is None else int(edits.slots[i])
    if edits is not None and slot >= 0:
        own = slice(int(edits.starts[slot, 0]), int(edits.starts[slot, -1]))
        tokens = edits.tokens[own].long()
        factor, penalty, bias = edits.values[own].unbind(1)
        x = row[tokens]
        x = torch.where(x > 0, x / factor, x * factor) - penalty
        row[tokens] = torch.where(bias == -torch.inf, -torch.inf, x + bias)
    grammar = -1 if masks is None else int(masks.slots[i])
    if masks is not None and grammar >= 0:
        allowed = allowed_row(masks, grammar, len(row))
        if not bool((row.isfinite() & allowed).any()):
            row = scores.logits[i].clone()
        row[~allowed] = -torch.inf
    return row


def filtered_row(row: Tensor, settings: RowSettings, i: int) -> Tensor:
    """[V] float64 log weights: over the temperature, -inf where filtered out."""
    best = max(float(row.max()), torch.finfo(torch.float32).min)
    scaled = ((row - best) / settings.temperature[i]).double()
    order = torch.sort(scaled, descending=True, stable=True).indices
    top_k = int(settings.top_k[i])
    order = order[:top_k] if top_k > 0 else order
    weight = torch.softmax(scaled[order], 0)
    before = weight.cumsum(0) - weight
    top_p = float(settings.top_p[i])
    keep = (before < top_p) if top_p < 1 else torch.ones_like(before, dtype=torch.bool)
    keep &= weight >= float(settings.min_p[i]) * weight[0]
    keep[0] = True
    out = torch.full_like(scaled, -torch.inf)
    out[order[keep]] = scaled[order[keep]]
    return out


def first_best(row: Tensor) -> int:
    return int((row == row.max()).nonzero()[0, 0])


def uniform(key: int, like: Tensor) -> Tensor:
    """[V] float64: SplitMix64 of a counter (Steele, Lea and Flood, 2014), 52 bits and a half of each."""
    x = key + torch.arange(1, len(like) + 1, device=like.device) * _signed(_GOLDEN)
    x = (x ^ _right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _right(x, 27)) * _signed(_MIX_2)
    x = x ^ _right(x, 31)
    return (_right(x, 12).double() + 0.5) * 2.0**-52


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _right(x: Tensor, bits: int) -> Tensor:
    """Logical shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def settings_of(
    *,
    temperature: list[float],
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
    keys: list[int] | None = None,
    width: int,
    device: torch.device | str = "cpu",
) -> RowSettings:
    """Settings from plain numbers, in the form that the wrappers ask for."""
    rows = len(temperature)
    top_k, top_p = top_k or [0] * rows, top_p or [1.0] * rows
    warm = [i for i in range(rows) if temperature[i] > 0]
    cut = [i for i in warm if 0 < top_k[i] < width or top_p[i] < 1]

    def tensor(values: list[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    return RowSettings(
        tensor([max(t, 2.0**-126) if t else 0.0 for t in temperature], torch.float32),
        tensor([k if 0 < k < width else 0 for k in top_k], torch.int32),
        tensor(top_p, torch.float64),
        tensor(min_p or [0.0] * rows, torch.float64),
        tensor(keys or list(range(rows)), torch.int64),
        tensor(warm, torch.int32),
        tensor(cut, torch.int32),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


def example(
    rows: int,
    device: torch.device | str,
    *,
    width: int = 129280,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[str, Any]:
    """Arguments of `sample_rows` at V4's width: logits of a language model's form, a few far above the rest."""
    logits = 2.5 * torch.randn(rows, width, device=device)
    high = torch.randint(0, width, (rows, 64), device=device)
    logits.scatter_add_(1, high, 6 * torch.rand(rows, 64, device=device) + 8)
    settings = settings_of(
        temperature=[temperature] * rows,
        top_k=[top_k] * rows,
        top_p=[top_p] * rows,
        min_p=[min_p] * rows,
        keys=torch.randint(-(2**62), 2**62, (rows,)).tolist(),
        width=width,
        device=device,
    )
    return {"scores": Scores(logits), "settings": settings}
