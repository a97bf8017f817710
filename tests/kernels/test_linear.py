"""`Linear` against float64, and its rows alone against the same rows in any batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.kernels import (
    ROWS,
    U16,
    assert_rows_stand_alone,
    assert_within,
    differing_windows,
    displaced,
    gamma,
    in_wider_rows,
    same_bits,
    threads,
)
from weft.kernels import linear
from weft.kernels.linear import Linear, LinearPlan, _runner, candidates

# The weights of the tiny preset.
TINY = [
    (64, 128),
    (48, 128),
    (112, 128),
    (24, 512),
    (8, 128),
    (256, 48),
    (512, 48),
    (24, 128),
    (128, 48),
    (128, 64),
    (512, 128),
]
LARGE = [(1024, 1024), (512, 4096)]
# Widths that no kernel divides; [5, 4097] leaves `choose` nothing but row by row on AVX-512 machines.
ODD = [(1, 1), (3, 1), (1, 3), (7, 33), (33, 64), (5, 4097), (4500, 16)]
DTYPES = [torch.float32, torch.bfloat16]
SINGLE = LinearPlan("single", 1)
PLANS = [LinearPlan("packed", 1), *(LinearPlan("padded", m) for m in (4, 8, 16)), SINGLE]
PLANS += [LinearPlan("numpy", m) for m in (2, 4)]
# Larger than any batch the self-check of `choose` tries.
LONG = (1, 2, 5, 255, 511, 1000, 2047)


def draw(n: int, k: int, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(rows, k).to(dtype)


def draw_cancelling(n: int, k: int, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Two huge terms of opposite sign per product: what is left shows the rounding of every partial sum.

    Without them a bfloat16 result hides most differences of order in its own rounding.
    """
    weight, x = draw(n, k, dtype, rows)
    if k > 1:
        first, second = torch.randperm(k)[:2]
        weight[:, second] = weight[:, first]
        x[:, first] *= 2.0**16 if dtype == torch.bfloat16 else 2.0**8
        x[:, second] = -x[:, first]
    return weight, x


def each_case(function: object) -> object:
    """Parametrise over dtypes and all shapes."""
    shapes = pytest.mark.parametrize(("n", "k"), [*TINY, *LARGE, *ODD])
    return shapes(pytest.mark.parametrize("dtype", DTYPES)(function))


def product_bound(weight: Tensor, x: Tensor, exact: Tensor) -> Tensor:
    """K products and K - 1 sums in float32 in any order, then one rounding to the dtype of the result."""
    terms = x.double().abs() @ weight.double().abs().T
    bound = gamma(weight.shape[1]) * terms
    return bound + (bound + exact.abs()) * U16 if weight.dtype == torch.bfloat16 else bound


@each_case
def test_close_to_float64(n: int, k: int, dtype: torch.dtype) -> None:
    weight, x = draw(n, k, dtype, rows=21)
    exact = x.double() @ weight.double().T
    got = Linear(weight)(x)
    assert got.dtype == dtype
    assert_within(got, exact, product_bound(weight, x, exact))


@each_case
def test_rows_stand_alone(n: int, k: int, dtype: torch.dtype) -> None:
    for weight, x in (draw(n, k, dtype), draw_cancelling(n, k, dtype)):
        assert_rows_stand_alone(Linear(weight), x)


@pytest.mark.parametrize(("n", "k"), TINY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_batches(n: int, k: int, dtype: torch.dtype) -> None:
    """Prefill chunks: BLAS changes kernels at sizes that the self-check does not try."""
    weight, x = draw_cancelling(n, k, dtype, rows=max(LONG) + 1)
    module = Linear(weight)
    tail = torch.cat([module(row) for row in x[-40:].clone().split(1)])
    for size in LONG:
        part = x[-size - 1 : -1].clone()
        kept = min(size, 39)
        assert same_bits(module(part)[-kept:], tail[-1 - kept : -1]), size


@each_case
def test_layout_of_the_input_does_not_matter(n: int, k: int, dtype: torch.dtype) -> None:
    """A caller passes slices of columns (the groups of wo_a) and of larger buffers: the rows are the same."""
    weight, x = draw_cancelling(n, k, dtype, rows=17)
    module = Linear(weight)
    for rows in (1, 2, 3, 4, 8, 12, 16, 17):
        part = x[:rows].clone()
        plain = module(part)
        for by in (1, 2, 4, 7):
            assert same_bits(module(displaced(part, by)), plain), (rows, "displaced", by)
        for before, behind in ((0, 3), (5, 0), (4, 12), (16, 48)):
            assert same_bits(module(in_wider_rows(part, before, behind)), plain), (rows, "columns", before, behind)
        assert same_bits(module(part.T.contiguous().T), plain), (rows, "transposed")


@each_case
def test_place_of_the_weight_does_not_matter(n: int, k: int, dtype: torch.dtype) -> None:
    """A checkpoint is mapped at another address by the next process, which has to give the same bits."""
    weight, x = draw_cancelling(n, k, dtype, rows=9)
    plain = Linear(weight)(x)
    for by in (1, 2, 4, 7):
        assert same_bits(Linear(displaced(weight, by))(x), plain), by


@pytest.mark.parametrize(("n", "k"), [*TINY, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_passes_the_self_check_holds(n: int, k: int, dtype: torch.dtype, plan: LinearPlan) -> None:
    """Whatever `choose` may return: what it accepts after a few sizes of one draw has to hold for all."""
    if plan not in candidates(n, k, dtype):
        pytest.skip("not a plan for this dtype here")
    if plan != SINGLE and not accepted(plan, n, k, dtype):
        pytest.skip("not invariant for this shape on this machine, and found out")
    weight, x = draw_cancelling(n, k, dtype, rows=ROWS if n * k < 1 << 18 else 110)
    assert differing_windows(_runner(plan, weight), x, offsets=(0, 6)) == []


def accepted(plan: LinearPlan, n: int, k: int, dtype: torch.dtype) -> bool:
    """The verdict of the self-check on one plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "candidates", lambda n, k, dtype: [plan, SINGLE])
        return linear.choose.__wrapped__(n, k, dtype, 1) == plan


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads(dtype: torch.dtype) -> None:
    sizes = (1, 2, 3, 8, 17, 64)
    with threads(2):
        for n, k in [(64, 128), (8, 128), (24, 512), (256, 48), (512, 4096)]:
            weight, x = draw_cancelling(n, k, dtype, rows=67)
            assert differing_windows(Linear(weight), x, sizes=sizes, offsets=(0, 3)) == [], (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    got = Linear(torch.randn(5, 3).to(dtype))(torch.empty(0, 3))
    assert got.shape == (0, 5)
    assert got.dtype == dtype


def test_input_is_cast_to_the_dtype_of_the_weight() -> None:
    weight, x = draw(24, 33, torch.float32, rows=5)
    assert same_bits(Linear(weight)(x.bfloat16()), Linear(weight)(x.bfloat16().float()))
    assert same_bits(Linear(weight)(x.half()), Linear(weight)(x.half().float()))
    narrow = weight.bfloat16()
    assert same_bits(Linear(narrow)(x), Linear(narrow)(x.bfloat16()))


def test_neither_weight_nor_input_is_changed() -> None:
    for n, k in ((24, 33), (1024, 512)):
        weight, x = draw(n, k, torch.float32, rows=5)
        kept = weight.clone(), x.clone()
        Linear(weight)(x)
        assert same_bits(weight, kept[0])
        assert same_bits(x, kept[1])


def test_wrong_shapes_are_refused() -> None:
    module = Linear(torch.randn(4, 3))
    for shape in ((2, 4), (3,), (1, 2, 3)):
        with pytest.raises(AssertionError):
            module(torch.randn(shape))
    with pytest.raises(AssertionError):
        Linear(torch.randn(4, 3).double())


def test_the_check_can_fail() -> None:
    """Plain BLAS breaks the invariance that the tests above look for."""
    for n, k in [*TINY, *LARGE]:
        weight, x = draw(n, k, torch.float32)
        if differing_windows(lambda rows, weight=weight: F.linear(rows, weight), x):
            return
    pytest.skip("F.linear is row-invariant for all these shapes on this machine's BLAS")
