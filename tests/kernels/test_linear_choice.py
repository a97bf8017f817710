"""How `choose` picks a plan: the first that holds, never one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels import linear
from weft.kernels.linear import Linear, LinearPlan, candidates

FIRST = LinearPlan("packed", 1)
SECOND = LinearPlan("padded", 4)
LAST = LinearPlan("single", 1)

Fault = Callable[[Tensor], Tensor]


def nudge(y: Tensor) -> Tensor:
    """One unit in the last place more: the least that can differ."""
    return torch.nextafter(y, torch.full_like(y, torch.inf))


def more_than_one_row(y: Tensor) -> Tensor:
    return nudge(y) if y.shape[0] > 1 else y


def from_48_rows(y: Tensor) -> Tensor:
    return nudge(y) if y.shape[0] >= 48 else y


def last_row_of_an_odd_batch(y: Tensor) -> Tensor:
    return torch.cat((y[:-1], nudge(y[-1:]))) if y.shape[0] % 2 and y.shape[0] > 1 else y


def rows_beyond_a_tile_of_16(y: Tensor) -> Tensor:
    whole = y.shape[0] // 16 * 16
    return torch.cat((y[:whole], nudge(y[whole:]))) if whole else y


def one_element(y: Tensor) -> Tensor:
    y = y.clone()
    if y.shape[0] == 7:
        y[3, 5] = nudge(y[3, 5])
    return y


FAULTS = [more_than_one_row, from_48_rows, last_row_of_an_odd_batch, rows_beyond_a_tile_of_16, one_element]


def plant(monkeypatch: pytest.MonkeyPatch, faults: dict[LinearPlan, Fault]) -> None:
    """Offer the keys of `faults`, then row by row; each multiplies rightly row by row, then adds its fault."""

    def runner(plan: LinearPlan, weight: Tensor) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = torch.cat([F.linear(row.clone(), weight) for row in x.split(1)])
            return faults[plan](y) if plan in faults else y

        return run

    monkeypatch.setattr(linear, "candidates", lambda n, k, dtype: [*faults, LAST])
    monkeypatch.setattr(linear, "_runner", runner)


def pick(n: int = 24, k: int = 32) -> LinearPlan:
    """Without the cache, which would outlive what a test plants."""
    return linear.choose.__wrapped__(n, k, torch.float32, 1)


def sound(y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_that_is_not_invariant_is_rejected(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {FIRST: fault, SECOND: sound})
    assert pick() == SECOND


@pytest.mark.parametrize("fault", FAULTS)
def test_row_by_row_is_left_when_all_fail(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {FIRST: fault, SECOND: fault})
    assert pick() == LAST


def test_the_first_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {SECOND: sound, FIRST: sound})
    assert pick() == SECOND


def test_linear_runs_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at a batch size that no check tries shows which runner is at work."""
    plant(monkeypatch, {FIRST: lambda y: y + 1000 if y.shape[0] == 77 else y})
    monkeypatch.setattr(linear, "choose", linear.choose.__wrapped__)
    module = Linear(torch.randn(24, 32))
    assert module.plan == FIRST
    assert float(module(torch.randn(77, 32)).mean()) > 900
    assert float(module(torch.randn(76, 32)).abs().max()) < 900


def test_plain_blas_planted_first_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real fault: F.linear as it is."""
    plain = LinearPlan("padded", 1)
    monkeypatch.setattr(linear, "candidates", lambda n, k, dtype: [plain, LAST])
    shapes = [(64, 128), (256, 48), (24, 512), (512, 4096)]
    picked = {pick(n, k) for n, k in shapes}
    if picked == {plain}:
        pytest.skip("F.linear is row-invariant for these shapes on this machine's BLAS")
    assert LAST in picked


def test_every_list_ends_with_row_by_row() -> None:
    for n, k in ((1, 1), (8, 128), (512, 512), (129_280, 4096)):
        plans = candidates(n, k, torch.float32)
        assert plans[-1] == LAST
        assert len(set(plans)) == len(plans)


def test_prepacking_is_preferred_for_large_weights_only() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not available")
    assert candidates(1024, 1024, torch.float32)[0].method == "packed"
    assert candidates(64, 128, torch.bfloat16)[0].method == "padded"


def test_numpy_is_preferred_for_small_float32_weights_only() -> None:
    assert candidates(64, 128, torch.float32)[0].method == "numpy"
    for case in ((1024, 1024, torch.float32), (64, 128, torch.bfloat16)):
        assert all(plan.method != "numpy" for plan in candidates(*case))


def test_choice_is_made_once_per_shape_dtype_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    honest = linear._is_row_invariant
    monkeypatch.setattr(linear, "_is_row_invariant", lambda *args: calls.append(1) or honest(*args))
    linear.choose(19, 23, torch.float32, 1)
    made = len(calls)
    assert made > 0
    linear.choose(19, 23, torch.float32, 1)
    assert len(calls) == made
    linear.choose(19, 23, torch.bfloat16, 1)
    assert len(calls) > made


def test_a_plan_prints_as_method_and_multiple() -> None:
    assert str(LinearPlan("padded", 4)) == "padded/4"
