"""Rejection sampling: what is drawn has the model's distribution, whatever drafts were drawn from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from support.gtest import g_test
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.rejection import REJECTED, guess, judge
from weft.runtime.decoding.sampler import Draw, distribution, sample

WIDTH, SAMPLES, AT_ONCE = 24, 200_000, 20_000
ALLOWED = np.arange(WIDTH) % 3 != 0
MODES = {
    "plain": Draw(SamplingParams(temperature=0.9), 7, 0),
    "top_p": Draw(SamplingParams(temperature=1.3, top_p=0.8, top_k=15, presence_penalty=0.5), 7, 0, counts={3: 2}),
    "grammar": Draw(SamplingParams(temperature=1.1), 7, 0, allowed=ALLOWED),
}


def two_models() -> tuple[Tensor, Tensor]:
    """Logits of a model, and of one that drafts for it and is right more often than not."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(WIDTH, generator=generator)
    return logits, logits + 0.8 * torch.randn(WIDTH, generator=generator)


def drawn(draw: Draw, *, certain: bool) -> tuple[Tensor, Tensor, float]:
    """How often each token came out; the same had the residual been left out; how often drafts were accepted.
    certain: always the same draft."""
    logits, drafting = two_models()
    logits = logits.expand(AT_ONCE, -1)
    right, wrong, accepted = torch.zeros(WIDTH), torch.zeros(WIDTH), 0
    for first in range(0, SAMPLES, AT_ONCE):
        draws = [dataclasses.replace(draw, position=first + i) for i in range(AT_ONCE)]
        drafts, odds = guess(drafting.expand(AT_ONCE, -1), draws)
        if certain:
            drafts = [int(distribution(logits[:1], [draw]).argmax())] * AT_ONCE
            odds = torch.nn.functional.one_hot(torch.tensor(drafts), WIDTH).double()
        out = torch.tensor(judge(logits, draws, drafts, odds))
        again = (out == REJECTED).nonzero()[:, 0].tolist()
        accepted += AT_ONCE - len(again)
        for counts, refused in ((right, odds), (wrong, None)):
            own = [
                dataclasses.replace(draws[i], refused=refused[i] if refused is not None else None) for i in again
            ]
            out[again] = torch.tensor(sample(logits[: len(again)], own))
            counts += torch.bincount(out, minlength=WIDTH)
    return right, wrong, accepted / SAMPLES


@pytest.mark.parametrize(
    ("mode", "certain"), [("plain", False), ("plain", True), ("top_p", False), ("grammar", False)]
)
def test_the_distribution_is_the_models(mode: str, certain: bool) -> None:
    """And a G-test sees it if the residual is left out."""
    want, drafting = (distribution(logits[None], [MODES[mode]])[0] for logits in two_models())
    right, wrong, accepted = drawn(MODES[mode], certain=certain)
    assert not g_test(right, want) and g_test(wrong, want)
    best = float(want.max()) if certain else float(torch.minimum(want, drafting).sum())
    assert abs(accepted - best) < 0.01  # as often as can be


def test_greedy_drafts_are_right_if_they_are_the_best() -> None:
    logits, drafting = two_models()
    draws = [Draw(SamplingParams(temperature=0), 1, 0)]
    for own in (logits, drafting):
        (draft,), odds = guess(own[None], draws)
        assert draft == int(own.argmax())
        right = draft == int(logits.argmax())
        assert judge(logits[None], draws, [draft], odds) == [draft if right else REJECTED]
    assert sample(logits[None], [dataclasses.replace(draws[0], refused=odds[0])]) == [int(logits.argmax())]


def test_equal_distributions_leave_nothing_to_refuse() -> None:
    logits = two_models()[0]
    draw = MODES["plain"]
    same = distribution(logits[None], [draw])[0]
    assert 0 <= sample(logits[None], [dataclasses.replace(draw, refused=same)])[0] < WIDTH
