"""What is drawn where the logits are is what the host draws, in Triton's interpreter and by the reference."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.engine import draft_always, finish, running, small_config, some_tokens
from support.gtest import g_test
from support.interpreted import quick_calls
from weft.kernels.triton import sampling_cut
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.decoding import device_sampler, rejection, sampler
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.decoding.sampler import Draw
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.model.model import Model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = pytest.mark.parametrize("implementation", ["triton", "reference"])
TEMPERATURES = (0.0, 1e-45, 1e-6, 0.3, 1.0, 1.7, 1e9)


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with quick_calls():
        yield


@st.composite
def logits_rows(draw: st.DrawFn, rows: int, width: int) -> Tensor:
    """Far apart, close together, with many equals, and with some at -inf."""
    kind = draw(st.sampled_from(["normal", "ties", "peaked", "huge"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, width, generator=generator)
    x = {"normal": 3 * x, "ties": (2 * x).round(), "peaked": x**3 * 20, "huge": x * 1e30}[kind]
    if draw(st.booleans()):
        x[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))] = -torch.inf
    return x


@st.composite
def draw_of(draw: st.DrawFn, width: int) -> Draw:
    tokens = st.integers(0, width - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from(TEMPERATURES)),
        top_k=draw(st.sampled_from([-1, -1, 1, 2, 5, 30, 10_000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-9, 0.31, 0.618, 0.9377, 1 - 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.021, 0.37, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-100, -3.7, 0.1, 55.5]), max_size=3)),
    )
    chosen = st.lists(tokens, max_size=6)
    allowed = None
    if draw(st.integers(0, 3)) == 0:
        allowed = np.zeros(width, np.bool_)
        allowed[draw(st.lists(tokens, max_size=5))] = True
        if draw(st.booleans()):
            allowed = ~allowed
    counts = dict.fromkeys(draw(chosen), draw(st.integers(1, 4)))
    history = [*draw(chosen), width + 3]
    blocked = draw(chosen) if draw(st.booleans()) else []
    return Draw(params, draw(st.integers(0, 2**63)), draw(st.integers(0, 9)), blocked, counts, history, allowed)


@st.composite
def batches(draw: st.DrawFn, widths: st.SearchStrategy[int] | None = None) -> tuple[Tensor, list[Draw]]:
    width = draw(st.integers(1, 70) if widths is None else widths)
    rows = draw(st.integers(1, 4))
    return draw(logits_rows(rows, width)), [draw(draw_of(width)) for _ in range(rows)]


def edges(logits: Tensor, draws: list[Draw]) -> float:
    """How near the host's filters come to a case that rounding decides: the least distance of the probability
    before a token from top_p, and of one over the best's from min_p. Sums of other orders differ by 1e-13 here."""
    scores = sampler._adjust(logits, draws)
    nearest = math.inf
    for row, one in zip(scores, draws, strict=True):
        p = one.params
        if not p.temperature or (p.top_p == 1 and p.min_p in (0, 1)):
            continue
        plain = dataclasses.replace(one, params=SamplingParams(temperature=p.temperature, top_k=p.top_k))
        scaled = sampler._scaled(row[None], [plain])[0].double()
        share = torch.softmax(scaled, 0).sort(descending=True).values
        if p.top_p < 1:
            before = share.cumsum(0) - share
            nearest = min(nearest, float((before - p.top_p).abs().min()))
        if p.min_p not in (0, 1):
            nearest = min(nearest, float((share / share[0] - p.min_p).abs().min()))
    return nearest


def there(draws: list[Draw]) -> list[Draw]:
    """What was refused is on the device."""
    return [d if d.refused is None else dataclasses.replace(d, refused=d.refused.to(DEVICE)) for d in draws]


def same_tokens(logits: Tensor, draws: list[Draw], implementation: str) -> None:
    before = logits.clone()
    want = sampler.sample(logits, draws)
    assert device_sampler.sample(logits.to(DEVICE), there(draws), implementation=implementation) == want
    assert torch.equal(logits, before)


# Where nothing is left of a row, its sums are NaN and nothing is near anything.
FAR = 1e-10


@KINDS
@settings(max_examples=24, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(batch=batches())
def test_tokens_are_the_hosts(batch: tuple[Tensor, list[Draw]], implementation: str) -> None:
    logits, draws = batch
    assume(not edges(logits, draws) < FAR)
    same_tokens(logits, draws, implementation)


@settings(max_examples=5, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(batch=batches(st.sampled_from([2047, 2048, 2049, 4500])))
def test_tokens_are_the_hosts_over_several_blocks(batch: tuple[Tensor, list[Draw]]) -> None:
    logits, draws = batch
    assume(not edges(logits, draws) < FAR)
    same_tokens(logits, draws, "triton")


@settings(max_examples=5, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(batch=batches(st.integers(40, 70)))
def test_long_lists_of_tokens_near_a_cut(batch: tuple[Tensor, list[Draw]]) -> None:
    logits, draws = batch
    assume(not edges(logits, draws) < FAR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_cut, "TILE", 16)
        same_tokens(logits, draws, "triton")


def _judged(logits: Tensor, draws: list[Draw], drafts: list[int], odds: Tensor, implementation: str) -> list[int]:
    return device_sampler.judge(logits.to(DEVICE), draws, drafts, odds, implementation=implementation)


@KINDS
@settings(max_examples=8, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_rejection_is_the_hosts(batch: tuple[Tensor, list[Draw]], seed: int, implementation: str) -> None:
    """Odds, drafts and verdicts, and what is drawn in place of a draft."""
    logits, draws = batch
    assume(not edges(logits, draws) < FAR and bool(torch.isfinite(sampler.distribution(logits, draws)).all()))
    generator = torch.Generator().manual_seed(seed)
    drafting = logits + torch.randn(logits.shape, generator=generator)
    assume(not edges(drafting, draws) < FAR and bool(torch.isfinite(sampler.distribution(drafting, draws)).all()))
    drafts, odds = rejection.guess(drafting, draws)
    got, got_odds = device_sampler.guess(drafting.to(DEVICE), draws, implementation=implementation)
    assert got == drafts
    # Sums of 70 terms and exponentials, in float64.
    assert float((got_odds.cpu() - odds).abs().max()) < 1e-13
    want = rejection.judge(logits, draws, drafts, odds)
    rows = torch.arange(len(draws))
    for given_odds in (got_odds, got_odds[rows, torch.tensor(drafts)]):
        assert _judged(logits, draws, drafts, given_odds, implementation) == want
    more = (sampler.distribution(logits, draws) - odds).amax(1)
    clear = [bool(x > 1e-9) for x in more]  # else what is left is rounding
    again = [dataclasses.replace(d, refused=q) if c else d for d, q, c in zip(draws, odds, clear, strict=True)]
    same_tokens(logits, again, implementation)


def test_what_is_drawn_in_place_of_drafts_has_the_models_distribution() -> None:
    """Drafts that are accepted and what replaces the others, 3000 of them."""
    width, count = 12, 3000
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(width, generator=generator)
    drafting = logits + torch.randn(width, generator=generator)
    one = Draw(SamplingParams(temperature=1.2, top_k=9), 7, 0)
    draws = [dataclasses.replace(one, position=i) for i in range(count)]
    target, drafted = logits.expand(count, -1).to(DEVICE), drafting.expand(count, -1).to(DEVICE)
    kind = "reference" if DEVICE == "cpu" else "triton"
    if kind == "reference":  # slow
        draws, target, drafted = draws[:600], target[:600], drafted[:600]
    drafts, odds = device_sampler.guess(drafted, draws, implementation=kind)
    out = device_sampler.judge(target, draws, drafts, odds, implementation=kind)
    again = [i for i, token in enumerate(out) if token == rejection.REJECTED]
    assert 0.02 < len(again) / len(out) < 0.7
    others = [dataclasses.replace(draws[i], refused=odds[i]) for i in again]
    for i, token in zip(again, device_sampler.sample(target[again], others, implementation=kind), strict=True):
        out[i] = token
    seen = torch.bincount(torch.tensor(out), minlength=width).double()
    assert not g_test(seen, sampler.distribution(logits[None], [one])[0])


def test_strided_rows_and_what_lies_behind_them() -> None:
    """A head's padding is no part of a row, whatever is in it."""
    wide = torch.full((5, 90), torch.nan)
    wide[:, :75] = torch.randn(5, 75)
    draws = [Draw(SamplingParams(temperature=0.8 * (i % 3), top_p=0.81), 3, i, blocked=[i]) for i in range(5)]
    want = sampler.sample(wide[:, :75].clone(), draws)
    assert device_sampler.sample(wide.to(DEVICE)[:, :75], draws, implementation="triton") == want


def test_rows_do_not_mind_the_batch() -> None:
    logits = torch.randn(9, 2300) * 2
    draws = [
        Draw(
            SamplingParams(
                temperature=random.choice([0.0, 0.9]),
                top_k=random.choice([-1, 7]),
                top_p=random.choice([1.0, 0.83]),
                presence_penalty=random.choice([0.0, 0.5]),
            ),
            i,
            i,
            counts={5: 1},
        )
        for i in range(9)
    ]
    there = logits.to(DEVICE)
    together = device_sampler.sample(there, draws, implementation="triton")
    odds = device_sampler.distribution(there, draws, implementation="triton")
    order = random.sample(range(9), 9)
    mixed = [draws[i] for i in order]
    assert device_sampler.sample(there[order], mixed, implementation="triton") == [together[i] for i in order]
    assert torch.equal(device_sampler.distribution(there[order], mixed, implementation="triton"), odds[order])
    for i in range(9):
        row = there[i : i + 1].clone()
        assert device_sampler.sample(row, draws[i : i + 1], implementation="triton") == [together[i]]
        assert torch.equal(device_sampler.distribution(row, draws[i : i + 1], implementation="triton")[0], odds[i])


def test_no_rows() -> None:
    assert device_sampler.sample(torch.zeros(0, 8, device=DEVICE), []) == []
    assert device_sampler.logprobs(torch.zeros(0, 8, device=DEVICE), [], []) == []


@pytest.mark.parametrize("defined", [None, 30])
def test_logprobs(defined: int | None) -> None:
    """Equal ones in the order of ids; both are log_softmax's of float32."""
    logits = torch.cat((torch.randn(4, 50) * 4, torch.randn(4, 50).round()))
    tokens, top = [i * 6 for i in range(8)], [0, 1, 2, 50, 7, 0, 3, 12]
    top = [min(count, defined or 50) for count in top]
    want = sampler.logprobs(logits, tokens, top, defined)
    for got, one in zip(device_sampler.logprobs(logits.to(DEVICE), tokens, top, defined), want, strict=True):
        assert got.token == one.token
        assert got.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert [token for token, _ in got.top] == [token for token, _ in one.top]
        assert [value for _, value in got.top] == pytest.approx([value for _, value in one.top], abs=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_engine_draws_the_same(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts verified by equality or by rejection; filters, penalties, a grammar and log-probabilities."""
    config = small_config(4, 128)
    model = Model(config, dummy_weights(config, seed=1), deterministic=deterministic)
    asked = [
        SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=1.1, seed=3, top_p=0.87, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.9, seed=4, logprobs=0, grammar=Grammar("regex", "[a-z]{5}")),
    ]
    draft_always(monkeypatch)

    async def work(engine: Engine) -> list[Output]:
        prompt = some_tokens(20)
        return list(await asyncio.gather(*(engine.generate(prompt, params) for params in asked)))

    found = []
    for forced in (False, True):
        monkeypatch.setattr(sampler, "on_device", lambda logits, forced=forced: forced)
        with running(model, drafts=2) as engine:
            found.append(finish(work(engine)))
    for want, got in zip(*found, strict=True):
        assert (got.tokens, got.text) == (want.tokens, want.text)
        assert [entry.token for entry in got.logprobs] == [entry.token for entry in want.logprobs]
        values = [[entry.logprob for entry in output.logprobs] for output in (got, want)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
