"""Fast mode: drafts are accepted by rejection sampling, and outputs have the distribution they have without."""

from __future__ import annotations

import asyncio
from functools import cache

import pytest
import torch
from torch import Tensor

from support.engine import byte_tokenizer, draft_always, finish, running, small_config, some_tokens
from support.gtest import g_test
from support.run import run
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.decoding import sampler
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.decoding.sampler import Draw, distribution
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.model.model import Model

PROMPT = some_tokens(40, seed=1)
LENGTH, TOGETHER, CELLS = 100, 40, 50
MODES = {
    "plain": SamplingParams(temperature=0.7, max_tokens=LENGTH, ignore_eos=True),
    "top_p": SamplingParams(temperature=0.9, top_p=0.9, max_tokens=LENGTH, ignore_eos=True),
    "grammar": SamplingParams(temperature=1.0, max_tokens=LENGTH, grammar=Grammar("regex", "[a-z]{200}")),
}
LETTERS = [3 + byte for byte in range(ord("a"), ord("z") + 1)]


@pytest.fixture(autouse=True)
def never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


@cache
def fast_model() -> Model:
    """It drafts with weights that make about half of the drafts right."""
    config = small_config(4, 128)
    weights = dummy_weights(config, seed=1)
    return Model(config, weights, deterministic=False)


def cells(output: Output, params: SamplingParams, noise: torch.Generator) -> Tensor:
    """Where each token lies among those it was drawn from, likeliest first: one of equally likely cells.

    The place of a token, spread evenly over its probability, is uniform whatever the history."""
    tokens = output.tokens
    logits = run(fast_model(), [*PROMPT, *tokens[:-1]])[len(PROMPT) - 1 :][:, : byte_tokenizer().size]
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
    allowed[LETTERS] = True
    held = allowed.numpy() if params.grammar is not None else None
    odds = distribution(logits, [Draw(params, 0, 0, allowed=held)] * len(tokens))
    order = odds.argsort(dim=1, descending=True)
    ordered = odds.gather(1, order)
    place = (order == torch.tensor(tokens)[:, None]).int().argmax(1)
    rows = torch.arange(len(tokens))
    own = ordered[rows, place]
    before = ordered.cumsum(1)[rows, place] - own
    return ((before + own * torch.rand(len(tokens), generator=noise)) * CELLS).long().clamp(0, CELLS - 1)


def counted(params: SamplingParams, samples: int, drafts: int) -> tuple[Tensor, float]:
    """Tokens per cell, and the share of drafts that were right."""
    noise = torch.Generator().manual_seed(0)
    counts, drafted, accepted = torch.zeros(CELLS), 0, 0

    async def some(engine: Engine, first: int) -> list[Output]:
        own = [SamplingParams(**{**fields(params), "seed": first + i}) for i in range(TOGETHER)]
        return await asyncio.gather(*(engine.generate(PROMPT, one) for one in own))

    with running(fast_model(), drafts=drafts, tokens=20_000) as engine:
        for first in range(0, samples // LENGTH, TOGETHER):
            for output in finish(some(engine, first)):
                counts += torch.bincount(cells(output, params, noise), minlength=CELLS)
                drafted += output.usage.drafted
                accepted += output.usage.accepted
    return counts, accepted / max(drafted, 1)


def fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


@pytest.mark.parametrize("samples", [8_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_have_the_models_distribution(mode: str, samples: int) -> None:
    counts, right = counted(MODES[mode], samples, drafts=3)
    assert right > 0.02 and counts.sum() >= samples
    assert not g_test(counts, torch.full((CELLS,), 1 / CELLS))


def test_leaving_the_residual_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_excess", lambda scores, refused: scores)
    counts, _ = counted(MODES["grammar"], 40_000, drafts=3)
    assert g_test(counts, torch.full((CELLS,), 1 / CELLS))


def test_greedy_tokens_are_the_best_but_for_rounding() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with running(fast_model(), drafts=3) as engine:
        output = finish(engine.generate(PROMPT, params))
    logits = run(fast_model(), [*PROMPT, *output.tokens[:-1]])[len(PROMPT) - 1 :][:, : byte_tokenizer().size]
    own = logits.gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
    assert output.usage.drafted and bool((own > logits.amax(1) - 1e-4).all())
