"""Activations against float64, and the same bits wherever an element lies."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.kernels import U32, assert_rows_stand_alone, assert_within, differing_windows, on_tensors, same_bits
from weft.kernels import activation
from weft.kernels.constant import constant

swiglu, sqrt_softplus = on_tensors(activation.swiglu), on_tensors(activation.sqrt_softplus)

sigmoid = on_tensors(lambda x: activation.sigmoid_(-x, constant(1.0)))
Function = Callable[[Tensor], Tensor]

WIDTHS = [1, 3, 33, 64, 100, 128]
TINIEST = 2.0**-126  # what lies below the normal numbers may be lost
# Both tails, where exp over- or underflows, and the neighbourhood of zero.
HARD = [0.0, -0.0, 1e-30, -1e-30, 1e-8, 2.0**-24, 15.9, 16.7, 17.4, 88.0, 88.8, 104.0, 1e4, 3e38]
HARD += [-x for x in HARD]


def inputs() -> Tensor:
    return torch.cat((torch.tensor(HARD), torch.linspace(-100, 100, 2001), torch.randn(1000)))


def exact_softplus(x: Tensor) -> Tensor:
    """One element at a time, by the library function that is accurate at both ends."""
    return torch.tensor([max(v, 0.0) + math.log1p(math.exp(-abs(v))) for v in x.double().tolist()]).double()


def exact_sigmoid(x: Tensor) -> Tensor:
    """Without overflow: exp of negative numbers only."""
    values = [(1.0 if v >= 0 else math.exp(v)) / (1 + math.exp(-abs(v))) for v in x.double().tolist()]
    return torch.tensor(values, dtype=torch.float64)


def test_sigmoid_is_close() -> None:
    """exp within 2 u, one sum, one division: 5 u. Below -88 exp overflows and the result, < 2^-126, is 0."""
    x = inputs()
    exact = exact_sigmoid(x)
    assert_within(sigmoid(x), exact, 5 * U32 * exact + 2 * TINIEST)


def test_sqrt_softplus_is_close() -> None:
    """The root halves the relative error and adds its own rounding; it lifts 2^-126 to 2^-63."""
    x = inputs()
    exact = exact_softplus(x).sqrt()
    assert_within(sqrt_softplus(x), exact, 5 * U32 * exact + 2.0**-62)


def test_infinities() -> None:
    x = torch.tensor([torch.inf, -torch.inf])
    assert sigmoid(x)[0] == 1.0
    assert 0 <= sigmoid(x)[1] < TINIEST
    assert sqrt_softplus(x).tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("limit", [1.0, 10.0])
def test_swiglu_is_close(limit: float) -> None:
    gate, up = torch.randn(50, 33) * 8, torch.randn(50, 33) * 8
    clipped = gate.double().clamp(max=limit)
    silu = clipped * exact_sigmoid(clipped.flatten()).view_as(clipped)
    exact = silu * up.double().clamp(-limit, limit)
    got = swiglu(gate, up, limit)
    assert got.dtype == torch.float32
    assert_within(got, exact, 8 * U32 * exact.abs())


def test_swiglu_clamps_the_gate_above_only() -> None:
    gate, up = torch.tensor([[50.0, -50.0, -3.0]]), torch.tensor([[50.0, -50.0, 2.0]])
    at_limit = torch.tensor([[10.0, -50.0, -3.0]])
    assert same_bits(swiglu(gate, up, 10.0), swiglu(at_limit, torch.tensor([[10.0, -10.0, 2.0]]), 10.0))
    assert float(swiglu(gate, up, 10.0)[0, 2]) == pytest.approx(-6 / (1 + math.exp(3)), rel=1e-6)


def test_inputs_are_not_changed() -> None:
    x = inputs()
    kept = x.clone()
    for function in (sigmoid, sqrt_softplus, lambda v: swiglu(v, v, 1.0)):
        function(x)
        assert same_bits(x, kept)


@pytest.mark.parametrize("function", [sigmoid, sqrt_softplus, lambda x: swiglu(x, x.flip(1), 5.0)])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_stand_alone(function: Function, width: int) -> None:
    assert_rows_stand_alone(function, torch.randn(300, width) * 10)


@pytest.mark.parametrize("function", [sigmoid, sqrt_softplus])
def test_place_and_stride_do_not_matter(function: Function) -> None:
    """Elements of slices of columns, as gate and up are, and at every distance from an aligned address."""
    x = torch.randn(40, 50) * 10
    whole = function(x)
    for start in range(17):
        for width in (1, 15, 16, 17, 33):
            assert same_bits(function(x[:, start : start + width]), whole[:, start : start + width])
    for start in range(33):
        assert same_bits(function(x.flatten()[start:]), whole.flatten()[start:])
    assert same_bits(function(x.T), whole.T)


def test_swiglu_of_halves_of_a_product() -> None:
    both = torch.randn(29, 66) * 10
    gate, up = both.chunk(2, dim=1)
    assert same_bits(swiglu(gate, up, 3.0), swiglu(gate.clone(), up.clone(), 3.0))


@pytest.mark.parametrize("width", [0, 5])
def test_no_rows(width: int) -> None:
    for function in (sigmoid, sqrt_softplus):
        assert function(torch.empty(0, width)).shape == (0, width)
    assert swiglu(torch.empty(0, width), torch.empty(0, width), 1.0).shape == (0, width)


def test_the_check_can_fail() -> None:
    """torch's own functions use other code for the last elements of a vector."""
    for function in (torch.sigmoid, F.silu, F.softplus):
        for width in (1, 3, 33, 100):
            if differing_windows(function, torch.randn(300, width) * 10):
                return
    pytest.skip("torch.sigmoid, silu and softplus do not depend on an element's place on this machine")
