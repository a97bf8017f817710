"""What the sampler draws: filters against numpy, frequencies against probabilities, and no row minds another."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.runtime.decoding import sampler
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import Draw, logprobs, sample

GREEDY = SamplingParams(temperature=0.0)


def draws(params: SamplingParams, count: int, **more: object) -> list[Draw]:
    return [Draw(params, seed=11, position=position, **more) for position in range(count)]


def frequencies(logits: Tensor, params: SamplingParams, count: int = 8_000, **more: object) -> Tensor:
    """How often each token is drawn at `count` positions."""
    drawn = torch.tensor(sample(logits.expand(count, -1), draws(params, count, **more)))
    return torch.bincount(drawn, minlength=logits.shape[0]).double()


def assert_distributed(count: Tensor, probability: Tensor) -> None:
    """G-test; the limit is the chi-square quantile of one in a million (Wilson and Hilferty)."""
    drawable = probability > 0
    assert not count[~drawable].any()
    expected = probability[drawable] * count.sum()
    seen = count[drawable]
    statistic = 2 * float((torch.xlogy(seen, seen / expected)).sum())
    degrees = int(drawable.sum()) - 1
    if degrees:
        spread = 2 / (9 * degrees)
        assert statistic < degrees * (1 - spread + 4.753 * math.sqrt(spread)) ** 3


def kept(scores: np.ndarray, params: SamplingParams) -> set[int]:
    """top_k, top_p and min_p one after the other, each on what is left, renormalised; never empty."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    weight = np.exp(scores.astype(np.float64) - scores.max())
    if params.top_k > 0:
        order = order[: params.top_k]
    share = weight[order] / weight[order].sum()
    if params.top_p < 1:
        count = 1
        while count < len(order) and share[:count].sum() < params.top_p:
            count += 1
        order, share = order[:count], share[:count] / share[:count].sum()
    best = share[0]
    return {i for i, p in zip(order, share, strict=True) if p >= params.min_p * best}


def survivors(logits: Tensor, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Tokens that can be drawn: row i gets noise that would make token i win if it may."""
    width = logits.shape[0]
    monkeypatch.setattr(sampler, "gumbel", lambda keys, width: torch.eye(width).double() * 1e9)
    drawn = sample(logits.expand(width, -1), draws(params, width))
    return {token for i, token in enumerate(drawn) if token == i}


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.2},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("width", [1, 3, 64, 211])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filters_keep_what_numpy_keeps(
    filters: dict, width: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=temperature, **filters)
    for _ in range(3):
        logits = torch.randn(width) * 3
        scaled = logits.numpy() / np.float32(temperature)
        assert survivors(logits, params, monkeypatch) == kept(scaled, params)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.4}])
def test_ties_at_the_cut_keep_the_lower_ids(filters: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(**filters)
    for logits in (torch.tensor([1.0, 2, 2, 2, 1, 2, 0, 2]), torch.randint(0, 3, (300,)).float()):
        assert survivors(logits, params, monkeypatch) == kept(logits.numpy(), params)


@pytest.mark.parametrize("filters", [f for f in FILTERS if f != {"top_p": 1e-9}])
def test_frequencies_follow_the_filtered_probabilities(filters: dict) -> None:
    params = SamplingParams(temperature=0.8, **filters)
    logits = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, 1.0, -0.5, 0.7])
    scaled = logits.double() / 0.8
    hidden = sorted(set(range(8)) - kept(scaled.float().numpy(), params))
    scaled[hidden] = -torch.inf
    assert_distributed(frequencies(logits, params), torch.softmax(scaled, 0))


def test_the_frequency_check_can_fail() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5])
    count = frequencies(logits, SamplingParams())
    assert_distributed(count, torch.softmax(logits.double(), 0))
    with pytest.raises(AssertionError):
        assert_distributed(count, torch.softmax(logits.double() * 1.2, 0))


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0], [-1.0, -2.0, -1.0], [-0.0, 0.0, 0.0]])
    assert sample(logits, [Draw(GREEDY, 1, 1)] * 4) == [1, 0, 0, 0]
    wide = torch.zeros(3, 4099)
    wide[0, 4000:] = 1
    wide[1, 513] = wide[1, 4098] = 1
    assert sample(wide, [Draw(GREEDY, 1, 1)] * 3) == [4000, 513, 0]


def test_greedy_ignores_seed_and_filters() -> None:
    logits = torch.randn(20, 100)
    best = logits.argmax(1).tolist()
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
    assert sample(logits, draws(params, 20)) == best


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38, 1e-45, 1e-60])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}])
def test_a_temperature_near_zero_is_greedy(temperature: float, filters: dict) -> None:
    """Any positive temperature is valid: dividing by it must neither overflow nor give NaN."""
    logits = torch.tensor([[0.0, 3.0, 5.0, 4.0, -9.0], [-7.0, -6.0, -9.0, -5.0, -8.0]])
    params = SamplingParams(temperature=temperature, **filters).validate()
    assert sample(logits, draws(params, 2)) == [2, 3]


def test_a_high_temperature_is_uniform() -> None:
    count = frequencies(torch.tensor([9.0, 0.0, -9.0, 3.0]), SamplingParams(temperature=1e9))
    assert_distributed(count, torch.full((4,), 0.25).double())


def test_frequency_and_presence_penalties() -> None:
    """Count times the one plus the other, for tokens of the output only."""
    logits = torch.tensor([1.0, 0.8, 0.5, 0.3])
    params = SamplingParams(frequency_penalty=0.3, presence_penalty=0.25)
    count = frequencies(logits, params, counts={0: 3, 2: 1}, history=[0, 0, 0, 2, 1, 1])
    penalised = logits.double() - torch.tensor([3 * 0.3 + 0.25, 0, 0.3 + 0.25, 0]).double()
    assert_distributed(count, torch.softmax(penalised, 0))


def test_penalties_apply_before_greedy_and_may_be_negative() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    for params, counts, best in [
        (SamplingParams(temperature=0.0, presence_penalty=0.2), {0: 1}, 1),
        (SamplingParams(temperature=0.0, frequency_penalty=0.04), {0: 2}, 0),
        (SamplingParams(temperature=0.0, frequency_penalty=0.04), {0: 3}, 1),
        (SamplingParams(temperature=0.0, presence_penalty=-2.0), {2: 1}, 2),
        (SamplingParams(temperature=0.0), {0: 50}, 0),
    ]:
        assert sample(logits, [Draw(params, 1, 1, counts=counts)]) == [best]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -0.5])
    params = SamplingParams(repetition_penalty=2.0)
    count = frequencies(logits, params, history=[0, 0, 1, 3, 99])
    assert_distributed(count, torch.softmax(torch.tensor([1.0, -2.0, 0.5, 0.0, -0.5]).double(), 0))


def test_logit_bias_is_added_and_minus_100_forbids() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 150.0])
    params = SamplingParams(logit_bias={0: -1.0, 2: 1.5, 3: -100})
    exact = torch.softmax(torch.tensor([1.0, 1.0, 2.0, -torch.inf]).double(), 0)
    assert_distributed(frequencies(logits, params), exact)


def test_blocked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([5.0, 1.0, 0.0, 4.0])
    exact = torch.softmax(torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf]).double(), 0)
    assert_distributed(frequencies(logits, SamplingParams(), blocked=[0, 3]), exact)
    assert frequencies(logits, SamplingParams(top_k=1), 50, blocked=[0]).tolist() == [0, 0, 0, 50]
    assert frequencies(logits, SamplingParams(min_p=1.0), 50, blocked=[0, 3]).tolist() == [0, 50, 0, 0]
    assert sample(logits[None], [Draw(GREEDY, 1, 1, blocked=[0])]) == [3]


def mixed_draws(count: int, width: int) -> list[Draw]:
    """Rows that differ in every parameter, so that a mix-up of rows shows."""
    out = []
    for i in range(count):
        params = SamplingParams(
            temperature=random.choice([0.0, 0.3, 1.0, 1.7]),
            top_k=random.choice([-1, 1, 5, 40]),
            top_p=random.choice([1.0, 0.4, 0.95]),
            min_p=random.choice([0.0, 0.02]),
            presence_penalty=random.choice([0.0, 0.5]),
            repetition_penalty=random.choice([1.0, 1.0, 1.3]),
            logit_bias=random.choice([{}, {3: 1.0}]),
        )
        history = random.sample(range(width), 4)
        blocked = random.choice([(), (1, 2)])
        out.append(Draw(params, random.randrange(1 << 40), i, blocked, {history[0]: 2}, history))
    return out


@pytest.mark.parametrize("width", [5, 265, 513, 4099])
def test_rows_do_not_mind_the_batch(width: int) -> None:
    """The same tokens alone, in any part of the batch, and in any order; the logits stay as they are."""
    logits = torch.randn(40, width) * 2
    before = logits.clone()
    asked = mixed_draws(40, width)
    together = sample(logits, asked)
    assert torch.equal(logits, before)
    for i in range(40):
        assert sample(logits[i : i + 1].clone(), asked[i : i + 1]) == together[i : i + 1]
    for start, stop in ((0, 2), (1, 4), (7, 24), (3, 40)):
        assert sample(logits[start:stop].clone(), asked[start:stop]) == together[start:stop]
    order = random.sample(range(40), 40)
    assert sample(logits[order], [asked[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("width", [265, 513, 4099])
def test_a_cut_does_not_mind_the_batch(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums behind top_p and min_p have the same bits alone and together, whoever else is filtered."""
    logits = torch.randn(24, width) * 2
    asked = [Draw(SamplingParams(top_p=0.3 + i / 40, min_p=0.01 * (i % 3)), 1, i) for i in range(24)]
    monkeypatch.setattr(sampler, "gumbel", lambda keys, width: torch.zeros(len(keys), width).double())
    together = sampler._filter(logits, asked)
    for i in range(24):
        assert torch.equal(sampler._filter(logits[i : i + 1].clone(), asked[i : i + 1])[0], together[i])


def test_seed_and_position_decide_and_nothing_else() -> None:
    logits = torch.zeros(1, 4099)
    params = SamplingParams()
    tokens = {(s, p): sample(logits, [Draw(params, s, p)])[0] for s in range(6) for p in range(6)}
    assert len(set(tokens.values())) > 30
    assert sample(logits, [Draw(params, 3, 4)]) == [tokens[3, 4]]


def test_logprobs_are_the_models_own() -> None:
    """Natural logarithms of the softmax of the raw logits: an error of a few u of the largest logit."""
    for width in (1, 5, 265, 4099):
        logits = torch.randn(9, width) * 4
        exact = logits.double() - torch.logsumexp(logits.double(), 1, keepdim=True)
        tokens = [random.randrange(width) for _ in range(9)]
        top = [i % 4 for i in range(9)]
        for i, got in enumerate(logprobs(logits, tokens, top)):
            assert got.token == tokens[i]
            assert got.logprob == pytest.approx(float(exact[i, tokens[i]]), abs=2e-5)
            best = sorted(range(width), key=lambda j, i=i: (-float(logits[i, j]), j))[: top[i]]
            assert [token for token, _ in got.top] == best
            assert [value for _, value in got.top] == pytest.approx(exact[i, best].tolist(), abs=2e-5)


def test_alternatives_are_ids_that_the_tokenizer_defines() -> None:
    """Among all ids the padding of the head counts, as it does for the token itself."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0, 8.0]])
    exact = torch.log_softmax(logits, 1)[0].tolist()
    for token in (1, 4):
        (got,) = logprobs(logits, [token], [4], defined=3)
        assert (got.logprob, got.top) == (exact[token], ((1, exact[1]), (2, exact[2]), (0, exact[0])))


def test_logprobs_list_equals_by_id_and_do_not_mind_the_batch() -> None:
    assert [t for t, _ in logprobs(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [0], [3])[0].top] == [1, 2, 3]
    for width in (265, 513, 4099):
        logits = torch.randn(33, width) * 4
        tokens, top = [i % width for i in range(33)], [3] * 33
        together = logprobs(logits, tokens, top)
        alone = [logprobs(logits[i : i + 1].clone(), tokens[i : i + 1], [3])[0] for i in range(33)]
        assert alone == together
