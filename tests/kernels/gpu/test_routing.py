"""Scores, choice and weights of experts, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernels import U32, assert_within, gamma, same_bits
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.routing import Routes, least_bytes, route
from weft.kernels.gpu.weights import FloatWeight
from weft.kernels.reference import routing as reference
from weft.kernels.reference.routing import example

Given = dict[str, Any]


def arguments(tokens: int, device: str, **sizes: Any) -> Given:
    return example(tokens, device, **({"dim": 96, "experts": 8, "k": 3} | sizes))


def widened(given: Given) -> Given:
    return {
        **given,
        "x": given["x"].float(),
        "gate": FloatWeight.of(given["gate"].weight.float()),
    }


def hashed(given: Given, vocabulary: int = 50) -> Given:
    experts, device = given["gate"].shape[0], given["x"].device
    table = torch.rand(vocabulary, experts, device=device).argsort(1)[:, : given["k"]].sort(1).values.int()
    ids = torch.randint(0, vocabulary, (len(given["x"]),), device=device).int()
    return {**given, "bias": None, "table": table, "ids": ids}


def score_bound(x: Tensor, gate: Tensor) -> Tensor:
    """How far a float32 score may be from float64's.

    The product: exact in each term or rounded, summed in some order (tensor cores cut instead of rounding: twice
    the unit). softplus has the slope sigmoid(x); exp(-|x|), off by (|x| + 2) 2^-22 relatively, is in it with a
    slope of at most itself; its series and sums round some 20 times. The root halves relative errors.
    """
    x, gate = x.double(), gate.double()
    logit = x @ gate.T
    error = 2 * gamma(x.shape[1] + 2) * (x.abs() @ gate.abs().T)
    soft = torch.nn.functional.softplus(logit, threshold=50.0)
    inside = (
        torch.sigmoid(logit) * error + torch.exp(-logit.abs()) * (logit.abs() + 2) * 2.0**-22 + 20 * U32 * soft
    )
    return 0.5 * inside / soft.sqrt() + 2 * U32 * soft.sqrt()


def check(given: Given, **how: Any) -> Routes:
    routes = route(**given, **how)
    experts, k, scaling = given["gate"].shape[0], given["k"], given["scaling"]
    x, gate = given["x"], given["gate"].weight
    assert routes.experts.dtype == torch.int32 and routes.weights.dtype == torch.float32
    assert routes.experts.shape == routes.weights.shape == (len(x), k + 1)
    assert bool((routes.experts[:, k] == experts).all()) and bool((routes.weights[:, k] == 1).all())
    chosen = routes.experts[:, :k].long()
    assert bool((chosen[:, 1:] > chosen[:, :-1]).all()) and int(chosen.min()) >= 0 and int(chosen.max()) < experts
    s, bound = reference.scores(x, gate), score_bound(x, gate)
    if given["table"] is not None:
        assert torch.equal(chosen, given["table"][given["ids"].long().clamp(min=0)].long())
    else:
        # Nothing that was left out is better than what was taken by more than both may be off.
        biased = s + given["bias"].double()
        worst = (biased + bound + U32 * biased.abs()).gather(1, chosen).amin(1, keepdim=True)
        left = (biased - bound - U32 * biased.abs()).scatter(1, chosen, -torch.inf)
        assert bool((left <= worst).all())
    taken, off = s.gather(1, chosen), bound.gather(1, chosen)
    want = taken / taken.sum(1, keepdim=True) * scaling
    relative = off / taken + off.sum(1, keepdim=True) / taken.sum(1, keepdim=True) + (k + 3) * U32
    assert_within(routes.weights[:, :k].double(), want, 1.01 * want * relative)
    assert not given["gate"].locks.any()
    return routes


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("tokens", [1, 5, 18])
@pytest.mark.parametrize("table", [False, True])
def test_small(implementation: str, tokens: int, table: bool, device: str) -> None:
    given = arguments(tokens, device)
    given = hashed(given) if table else given
    check(given, implementation=implementation)
    check(widened(given), implementation=implementation)


@pytest.mark.parametrize(
    ("dim", "experts", "k", "tokens"), [(72, 5, 1, 3), (600, 48, 6, 2), (1300, 130, 8, 6), (64, 3, 3, 70)]
)
def test_odd_sizes(dim: int, experts: int, k: int, tokens: int, device: str) -> None:
    given = arguments(tokens, device, dim=dim, experts=experts, k=k)
    wide = torch.randn(tokens, dim + 16, device=device).bfloat16()
    check({**given, "x": wide[:, 16:]})
    check(hashed({**given, "x": wide[:, 16:]}))


def test_at_the_models_sizes(device: str) -> None:
    given = example(2, device)
    if device == "cuda":
        check(given)
        check(example(2, device, dim=7168, experts=384))
        return
    with traffic() as moved:
        check(given)
    assert moved.total <= 1.3 * least_bytes(2, 256, 4096, 6, 2)
    check(example(2, device, dim=7168, experts=384))


def test_equal_scores_go_to_the_lower_expert(device: str) -> None:
    given = arguments(6, device, experts=20, k=6)
    gate = given["gate"].weight
    gate[:] = gate[:1]  # all the same
    given["bias"][:] = 0.0
    assert route(**given).experts[:, :6].tolist() == [list(range(6))] * 6
    given["bias"][[3, 7, 19]] = 1.0
    assert route(**given).experts[:, :6].tolist() == [[0, 1, 2, 3, 7, 19]] * 6
    given["bias"][[3, 7, 19]] = -1.0
    assert route(**given).experts[:, :6].tolist() == [[0, 1, 2, 4, 5, 6]] * 6


def test_extremes(device: str) -> None:
    """Logits of all sizes: where softplus is the logit, and where it is exp of it, down to where that ends."""
    given = widened(arguments(7, device, dim=64))
    for row, size in enumerate((0.0, 1e-3, 1.0, 10.0, 40.0, 80.0, 1e4)):
        given["x"][row] = 0.0
        given["x"][row, :8] = torch.eye(8, device=device)[row] * size
    gate = torch.randn(8, 64, device=device)
    given["gate"] = FloatWeight.of(torch.where(gate.abs() < 0.3, 0.5, gate).clamp(-1.0, 1.0))
    given["bias"] = torch.linspace(-1e4, 1e4, 8, device=device)  # large beside the scores
    check({**given, "x": given["x"][:6]})
    given["gate"] = FloatWeight.of(given["gate"].weight.abs())
    check(given)


def test_padding_goes_somewhere(device: str) -> None:
    """Rows of padding have id -1, and may hold anything."""
    given = hashed(arguments(5, device))
    given["ids"][[1, 4]] = -1
    check(given)
    rest = torch.tensor([0, 2, 3], device=device)
    for case in (given, {**given, "table": None, "bias": torch.zeros(8, device=device)}):
        clean = route(**case)
        poisoned = case["x"].clone()
        poisoned[[1, 4]] = float("nan")
        routes = route(**{**case, "x": poisoned})
        assert int(routes.experts[:, :3].min()) >= 0 and int(routes.experts[:, :3].max()) < 8
        assert torch.equal(routes.experts[rest], clean.experts[rest])
        assert same_bits(routes.weights[rest], clean.weights[rest])


@pytest.mark.parametrize("wide", [False, True])
def test_a_row_has_the_same_bits_in_every_batch(wide: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs have a span, a group of spans or all of them, by the number of tokens; a width of nine spans."""
    given = example(67, device, dim=2100, experts=40)
    given = widened({**given, "x": given["x"][:, :540], "gate": _cut(given, 540)}) if wide else given
    pytest.importorskip("triton")
    from weft.kernels.triton import routing as kernels

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_MANY", 64)
        everything = route(**given)
    order = torch.randperm(67, device=device)
    for index in (order[:18], order[7:], *(order[i : i + 1] for i in range(3)), order[3:6]):
        part = route(**{**given, "x": given["x"][index], "ids": given["ids"][index]})
        assert torch.equal(part.experts, everything.experts[index])
        assert same_bits(part.weights, everything.weights[index])


def _cut(given: Given, dim: int) -> FloatWeight:
    return FloatWeight.of(given["gate"].weight[:, :dim])


def test_no_tokens(device: str) -> None:
    assert route(**arguments(0, device)).experts.shape == (0, 4)
