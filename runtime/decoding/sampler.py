"""Choose the next token of each row; rows do not influence each other.

Logits on the host are drawn from here, others where they are (`decoding.device_sampler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.runtime.decoding.noise import SAMPLE, gumbel, stream_key
from weft.runtime.decoding.params import SamplingParams

NEG_INF = float("-inf")
# The least normal float32: as one, a lower temperature would be 0.
COLDEST = 2.0**-126


@dataclass
class Draw:
    """One row to sample. position: index of the token to be drawn in its sequence.
    blocked: token ids that must not be drawn now. counts: how often each output token occurred. history: all
    tokens so far, read for repetition_penalty only. allowed: [V] what a grammar allows. refused: [V] float64, the
    probabilities that a draft was drawn with which was rejected (`decoding.rejection`)."""

    params: SamplingParams
    seed: int
    position: int
    blocked: Sequence[int] = ()
    counts: dict[int, int] = field(default_factory=dict)
    history: Sequence[int] = ()
    allowed: NDArray[np.bool_] | None = None
    refused: Tensor | None = None

    def is_plain(self) -> bool:
        """Whether the logits are used as they are."""
        p = self.params
        penalty = p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1
        return not (self.blocked or p.logit_bias or penalty or self.allowed is not None)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability under the model's own distribution (temperature 1, no filters)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def on_device(logits: Tensor) -> bool:
    """Whether they are drawn from where they are, by a module that imports this one."""
    return logits.device.type != "cpu"


def sample(
    logits: Tensor, draws: Sequence[Draw], purpose: int = SAMPLE, *, deterministic: bool = True
) -> list[int]:
    """logits: [B, V] float32, not modified -> one token id per row. Ties go to the lower id.
    purpose: of the noise (`decoding.noise`). deterministic: False lets a device's library bring its own noise."""
    if on_device(logits):
        from weft.runtime.decoding import device_sampler

        return device_sampler.sample(logits, draws, purpose, deterministic=deterministic)
    scores = _adjust(logits, draws)
    warm = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    if warm:
        chosen = [draws[i] for i in warm]
        scaled = _scaled(scores[torch.tensor(warm)], chosen).double()
        for i, draw in enumerate(chosen):
            if draw.refused is not None:
                scaled[i] = _excess(scaled[i], draw.refused)
        keys = torch.tensor([stream_key(d.seed, d.position, purpose) for d in chosen])
        noisy = scaled + gumbel(keys, scores.shape[1])
        warmed = dict(zip(warm, _first_argmax(noisy), strict=True))
        return [warmed.get(i, token) for i, token in enumerate(_first_argmax(scores))]
    return _first_argmax(scores)


def distribution(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[B, V] float64 probabilities that `sample` draws from, but for `Draw.refused`; beside the logits."""
    if on_device(logits):
        from weft.runtime.decoding import device_sampler

        return device_sampler.distribution(logits, draws)
    scores = _adjust(logits, draws)
    table = torch.zeros(scores.shape, dtype=torch.float64)
    table[torch.arange(len(draws)), torch.tensor(_first_argmax(scores))] = 1
    warm = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    if warm:
        rows = torch.tensor(warm)
        table[rows] = torch.softmax(_scaled(scores[rows], [draws[i] for i in warm]).double(), 1)
    return table


def _excess(scores: Tensor, refused: Tensor) -> Tensor:
    """[V] log weights of what the distribution has more of than the one that a rejected draft came from."""
    more = (torch.softmax(scores, 0) - refused).clamp_min(0)
    return more.log() if more.any() else scores  # equal but for rounding


def _scaled(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Adjusted scores of rows that are not greedy, over their temperature and filtered."""
    temperature = torch.tensor([max(d.params.temperature, COLDEST) for d in draws])
    # Differences to the best, so that dividing by next to nothing leaves it at 0 and the others at -inf.
    best = scores.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    return _filter((scores - best) / temperature[:, None], draws)


def logprobs(
    logits: Tensor, tokens: Sequence[int], top: Sequence[int], defined: int | None = None
) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` and of the `top[i]` best alternatives of each row of logits [B, V].

    defined: only lower ids are alternatives; their log-probabilities are still those among all V."""
    if on_device(logits):
        from weft.runtime.decoding import device_sampler

        return device_sampler.logprobs(logits, tokens, top, defined)
    table = torch.log_softmax(logits, dim=-1)
    own = table.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    out = []
    for i, (token, count) in enumerate(zip(tokens, top, strict=True)):
        values, ids = torch.sort(table[i, :defined], descending=True, stable=True)
        best = zip(ids[:count].tolist(), values[:count].tolist(), strict=True) if count else ()
        out.append(TokenLogprob(token, own[i], tuple(best)))
    return out


def _first_argmax(scores: Tensor) -> list[int]:
    """numpy promises the first of equal maxima, torch does not."""
    best: list[int] = scores.numpy().argmax(1).tolist()
    return best


def _adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Penalties, bias and blocked tokens, row by row and only where a row has any."""
    scores = logits
    for i, draw in enumerate(draws):
        if draw.is_plain():
            continue
        if scores is logits:
            scores = logits.clone()
        _adjust_row(scores[i], draw)
    return scores


def _adjust_row(row: Tensor, draw: Draw) -> None:
    p = draw.params
    before = row.clone() if draw.allowed is not None else row
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted({token for token in draw.history if token < row.shape[0]}), dtype=torch.int64)
        value = row[seen]
        row[seen] = torch.where(value > 0, value / p.repetition_penalty, value * p.repetition_penalty)
    if p.frequency_penalty or p.presence_penalty:
        for token, count in draw.counts.items():
            row[token] -= p.frequency_penalty * count + p.presence_penalty
    for token, bias in p.logit_bias.items():
        row[token] = NEG_INF if bias <= -100 else row[token] + bias
    if draw.blocked:
        row[torch.tensor(draw.blocked)] = NEG_INF
    if draw.allowed is not None:
        allowed = torch.from_numpy(draw.allowed)
        if not (row.isfinite() & allowed).any():  # other settings leave nothing of it
            row.copy_(before)
        row[~allowed] = NEG_INF


def _filter(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """top_k, top_p, min_p; each row keeps at least its best token."""
    vocabulary = scores.shape[1]
    if all(d.params.top_k == -1 and d.params.top_p == 1 and d.params.min_p == 0 for d in draws):
        return scores
    ordered, ids = torch.sort(scores, dim=1, descending=True, stable=True)
    top_k = torch.tensor([d.params.top_k if d.params.top_k > 0 else vocabulary for d in draws])
    ordered = ordered.masked_fill(torch.arange(vocabulary) >= top_k[:, None], NEG_INF)
    probability = torch.softmax(ordered.double(), dim=1)
    before = probability.cumsum(1) - probability
    top_p = torch.tensor([d.params.top_p for d in draws], dtype=torch.float64)[:, None]
    drop = (before >= top_p) & (top_p < 1)
    min_p = torch.tensor([d.params.min_p for d in draws], dtype=torch.float64)[:, None]
    drop |= probability < min_p * probability[:, :1]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, NEG_INF)
    return torch.empty_like(scores).scatter_(1, ids, ordered)
