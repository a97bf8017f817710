"""Drawing tokens where the logits are: what the draws ask for goes there in one copy, tokens come back in one.

The same as `sampler` and `rejection` on the host, whose docstrings say what is drawn; sums are float64 in another
order, so that a token on the very edge of top_p may fall to the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.gpu.sampling import (
    BLOCK,
    Edits,
    Masks,
    Refused,
    RowSettings,
    Scores,
    distribution_rows,
    judge_rows,
    sample_rows,
)
from weft.runtime.decoding.noise import ACCEPT, DRAFT, SAMPLE, stream_key
from weft.runtime.decoding.sampler import COLDEST, Draw, TokenLogprob

_HOTTEST = float(np.finfo(np.float32).max)
_ALIGNMENT = 16
_ID = (1 << 32) - 1


def sample(
    logits: Tensor,
    draws: Sequence[Draw],
    purpose: int = SAMPLE,
    *,
    deterministic: bool = True,
    implementation: str | None = None,
) -> list[int]:
    """As `sampler.sample`."""
    given = _Given(logits, draws, purpose)
    tokens = sample_rows(
        given.scores,
        given.settings,
        refused=given.refused,
        deterministic=deterministic,
        implementation=implementation,
    )
    return list(tokens.tolist())


def distribution(logits: Tensor, draws: Sequence[Draw], *, implementation: str | None = None) -> Tensor:
    """As `sampler.distribution`, on the device."""
    given = _Given(logits, draws, SAMPLE)
    return distribution_rows(given.scores, given.settings, implementation=implementation)


def guess(logits: Tensor, draws: Sequence[Draw], *, implementation: str | None = None) -> tuple[list[int], Tensor]:
    """As `rejection.guess`; the odds stay on the device."""
    given = _Given(logits, draws, DRAFT)
    tokens = sample_rows(given.scores, given.settings, refused=given.refused, implementation=implementation)
    odds = distribution_rows(given.scores, given.settings, implementation=implementation)
    return list(tokens.tolist()), odds


def judge(
    logits: Tensor,
    draws: Sequence[Draw],
    drafts: Sequence[int],
    odds: Tensor,
    *,
    implementation: str | None = None,
) -> list[int]:
    """As `rejection.judge`."""
    given = _Given(logits, draws, ACCEPT, drafts)
    if odds.dim() == 2:
        odds = odds.gather(1, given.drafts[:, None].long())[:, 0]
    odds = odds.to(logits.device)
    accepted = judge_rows(given.scores, given.settings, given.drafts, odds, implementation=implementation)
    return list(accepted.tolist())


def logprobs(
    logits: Tensor, tokens: Sequence[int], top: Sequence[int], defined: int | None = None
) -> list[TokenLogprob]:
    """As `sampler.logprobs`."""
    if not tokens:
        return []
    table = torch.log_softmax(logits, dim=-1)
    ids = torch.tensor(tokens, device=logits.device)
    columns = [table.gather(1, ids[:, None]).view(torch.int32)]
    alternatives = table[:, :defined]
    most = min(max(top), alternatives.shape[1])
    if most:
        # Scores in the upper half, descending ids in the lower one: no two are equal.
        bits = (alternatives + 0.0).view(torch.int32).long()
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ranks = (order << 32) + (_ID - torch.arange(bits.shape[1], device=logits.device))
        best = _ID - (torch.topk(ranks, most, dim=1).values & _ID)
        columns += [alternatives.gather(1, best).view(torch.int32), best.int()]
    found = torch.cat(columns, 1).cpu()
    own, values = found[:, 0].view(torch.float32).tolist(), found[:, 1 : 1 + most].view(torch.float32).tolist()
    places = found[:, 1 + most :].tolist()
    return [
        TokenLogprob(token, own[i], tuple(zip(places[i][:count], values[i][:count], strict=True)))
        for i, (token, count) in enumerate(zip(tokens, top, strict=True))
    ]


class _Given:
    """The draws of one call as tensors beside the logits, all of which are parts of one that was copied."""

    def __init__(
        self, logits: Tensor, draws: Sequence[Draw], purpose: int, drafts: Sequence[int] | None = None
    ) -> None:
        width = logits.shape[1]
        arrays = _settings(draws, width, purpose)
        arrays["drafts"] = np.array(drafts or [], np.int32)
        arrays |= _masks(draws, width) | _edits(draws, width)
        sent = _sent(arrays, logits.device)
        masks = Masks(sent["words"], sent["mask_slots"]) if len(sent["words"]) else None
        edits = None
        if len(sent["edit_rows"]):
            parts = ("edit_rows", "edit_slots", "edit_starts", "edit_tokens", "edit_values", "edit_left")
            edits = Edits(*(sent[part] for part in parts))
        self.scores = Scores(logits, masks, edits)
        names = ("temperature", "top_k", "top_p", "min_p", "keys", "warm", "filtered", "counters")
        self.settings = RowSettings(**{name: sent[name] for name in names}, nucleus=_is_nucleus(draws))
        self.drafts = sent["drafts"]
        self.refused: Refused | None = None
        odds = [d.refused for d in draws if _excess(d) and d.refused is not None]
        if odds:
            self.refused = Refused(torch.stack([row.to(logits.device) for row in odds]), sent["refused_slots"])


def _settings(draws: Sequence[Draw], width: int, purpose: int) -> dict[str, NDArray[Any]]:
    params = [draw.params for draw in draws]
    warm = [i for i, p in enumerate(params) if p.temperature > 0]
    top_k = [p.top_k if 0 < p.top_k < width else 0 for p in params]
    heat = [min(max(p.temperature, COLDEST), _HOTTEST) if p.temperature > 0 else 0.0 for p in params]
    return {
        "temperature": np.array(heat, np.float32),
        "top_k": np.array(top_k, np.int32),
        "top_p": np.array([p.top_p for p in params], np.float64),
        "min_p": np.array([p.min_p for p in params], np.float64),
        "keys": np.array([stream_key(d.seed, d.position, purpose) for d in draws], np.int64),
        "warm": np.array(warm, np.int32),
        "filtered": np.array([i for i in warm if top_k[i] or params[i].top_p < 1], np.int32),
        "counters": np.zeros(len(draws), np.int32),
        "refused_slots": _slots([_excess(draw) for draw in draws]),
    }


def _is_nucleus(draws: Sequence[Draw]) -> bool:
    """See `RowSettings.nucleus`."""
    warm = [draw.params for draw in draws if draw.params.temperature > 0]
    return bool(warm) and all(p.top_p < 1 and p.top_k <= 0 for p in warm)


def _excess(draw: Draw) -> bool:
    """Whether it draws from what a refused draft's distribution has too little of."""
    return draw.refused is not None and draw.params.temperature > 0


def _slots(asked: Sequence[bool]) -> NDArray[np.int32]:
    """Of each row, its number among those that ask, or -1."""
    wants = np.array(asked, np.bool_)
    return np.where(wants, np.cumsum(wants) - 1, -1).astype(np.int32)


def _masks(draws: Sequence[Draw], width: int) -> dict[str, NDArray[Any]]:
    words = -(-width // 32)
    held = [draw.allowed for draw in draws if draw.allowed is not None]
    packed = np.zeros((len(held), 4 * words), np.uint8)
    for row, allowed in zip(packed, held, strict=True):
        assert len(allowed) == width, (len(allowed), width)
        bits = np.packbits(allowed, bitorder="little")
        row[: len(bits)] = bits
    return {"words": packed.view("<i4"), "mask_slots": _slots([draw.allowed is not None for draw in draws])}


@dataclass(frozen=True)
class _RowEdits:
    """Of one row. tokens: ascending; values: [m, 3] (`weft.kernels.gpu.sampling.Edits`)."""

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]


def _edits(draws: Sequence[Draw], width: int) -> dict[str, NDArray[Any]]:
    found = [_row_edits(draw, width) for draw in draws]
    changed = [i for i, edits in enumerate(found) if len(edits.tokens)]
    kept = [found[i] for i in changed]
    firsts = np.cumsum([0, *(len(edits.tokens) for edits in kept)])
    ends = np.arange(-(-width // BLOCK) + 1) * BLOCK
    starts = [first + np.searchsorted(edits.tokens, ends) for first, edits in zip(firsts, kept, strict=False)]
    return {
        "edit_rows": np.array(changed, np.int32),
        "edit_slots": _slots([len(edits.tokens) > 0 for edits in found]),
        "edit_starts": np.array(starts, np.int32).reshape(len(kept), len(ends)),
        "edit_tokens": np.concatenate([np.zeros(0, np.int64), *(e.tokens for e in kept)]).astype(np.int32),
        "edit_values": np.concatenate([np.zeros((0, 3)), *(e.values for e in kept)]).astype(np.float32),
        "edit_left": np.zeros(len(kept), np.int32),
    }


def _row_edits(draw: Draw, width: int) -> _RowEdits:
    p = draw.params
    seen, counts = np.zeros(0, np.int64), {}
    if p.repetition_penalty != 1:
        seen = np.asarray(draw.history, np.int64)
        seen = np.unique(seen[seen < width])
    if p.frequency_penalty or p.presence_penalty:
        counts = draw.counts
    parts = (seen, list(counts), list(p.logit_bias), list(draw.blocked))
    tokens = np.unique(np.concatenate([np.asarray(part, np.int64) for part in parts]))
    values = np.tile(np.array([1, 0, 0], np.float32), (len(tokens), 1))
    values[np.searchsorted(tokens, seen), 0] = p.repetition_penalty
    penalties = [p.frequency_penalty * count + p.presence_penalty for count in counts.values()]
    values[np.searchsorted(tokens, list(counts)), 1] = penalties
    biases = [-np.inf if bias <= -100 else bias for bias in p.logit_bias.values()]
    values[np.searchsorted(tokens, list(p.logit_bias)), 2] = biases
    values[np.searchsorted(tokens, list(draw.blocked)), 2] = -np.inf
    return _RowEdits(tokens, values)


def _sent(arrays: dict[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Tensors like the arrays, parts of one that was copied."""
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = device.type == "cuda"
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    bytes_ = staged.numpy()
    for name, array in arrays.items():
        own = bytes_[places[name] : places[name] + array.nbytes]
        own[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = staged.to(device, non_blocking=True)
    return {
        name: there[places[name] : places[name] + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
