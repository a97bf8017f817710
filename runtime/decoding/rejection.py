"""Speculative sampling with rejection: drafts are accepted as often as can be without changing the distribution.

Leviathan et al. (2023) and Chen et al. (2023): a draft x, drawn with probability q(x), is accepted with
probability min(1, p(x) / q(x)); in place of the first one that is not, a token is drawn from the excess of p over
q. What is drawn has the distribution p, but which token it is depends on the drafts, so this is for fast mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.kernels.gpu.sampling import REJECTED
from weft.runtime.decoding import device_sampler, sampler
from weft.runtime.decoding.noise import ACCEPT, DRAFT, stream_key, uniform
from weft.runtime.decoding.sampler import Draw, distribution, sample

__all__ = ["REJECTED", "guess", "judge"]


def guess(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], Tensor]:
    """logits: [B, V] of a drafting model -> one draft per row, and the odds [B, V] that it was drawn with, beside
    the logits."""
    if sampler.on_device(logits):
        return device_sampler.guess(logits, draws)
    return sample(logits, draws, DRAFT), distribution(logits, draws)


def judge(logits: Tensor, draws: Sequence[Draw], drafts: Sequence[int], odds: Tensor) -> list[int]:
    """logits: [B, V] of the model. odds: float64 that the drafts were drawn with (1 for one that was certain to be
    drafted), [B] or, of all tokens, [B, V] -> each draft that is accepted, or REJECTED. The noise is not that of
    `sample`."""
    if sampler.on_device(logits):
        return device_sampler.judge(logits, draws, drafts, odds)
    rows = torch.arange(len(draws))
    chosen = torch.tensor(drafts)
    ratio = distribution(logits, draws)[rows, chosen] / (odds if odds.dim() == 1 else odds[rows, chosen])
    keys = torch.tensor([stream_key(draw.seed, draw.position, ACCEPT) for draw in draws])
    accepted = uniform(keys, 1)[:, 0] < ratio
    return torch.where(accepted, chosen, REJECTED).tolist()
