"""What the tests of the kernels share: bits, row invariance, and the error bounds of float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Around the tile heights of BLAS kernels and the vector widths of elementwise code, and well past both.
SIZES = (1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 100, 255)
OFFSETS = (0, 1, 6)
ROWS = max(SIZES) + max(OFFSETS)

# Unit roundoffs: half the distance from 1 to the next number.
U32 = 2.0**-24
U16 = 2.0**-8  # bfloat16

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def arrays(x: Any) -> Any:
    """Every tensor in x, in tuples too, as an array; memory is shared, bfloat16 widened."""
    if isinstance(x, Tensor):
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, tuple):
        return type(x)(*map(arrays, x)) if hasattr(x, "_fields") else tuple(map(arrays, x))
    return x


def tensors(x: Any) -> Any:
    """The way back."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    if isinstance(x, tuple):
        return type(x)(*map(tensors, x)) if hasattr(x, "_fields") else tuple(map(tensors, x))
    return x


def on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays as one of tensors, which most helpers here are written for."""

    @wraps(function, updated=())
    def run(*args: Any) -> Any:
        return tensors(function(*map(arrays, args)))

    return run


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than torch.equal: -0.0 differs from 0.0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def differing_windows(
    run: Callable[..., Tensor],
    *rows: Tensor,
    sizes: tuple[int, ...] = SIZES,
    offsets: tuple[int, ...] = OFFSETS,
) -> list[tuple[int, int]]:
    """(size, offset) of the batches in which some row has other bits than in a call of its own.

    run: tensors of n rows -> a tensor of n rows. Every call gets fresh copies, as a batch is built anew in each
    step, so that results may not depend on where in a larger tensor the rows lie.
    """
    total = rows[0].shape[0]
    alone = torch.cat([run(*(x[i : i + 1].clone() for x in rows)) for i in range(total)])
    return [
        (size, offset)
        for size in sizes
        for offset in offsets
        if size + offset <= total
        and not same_bits(run(*(x[offset : offset + size].clone() for x in rows)), alone[offset : offset + size])
    ]


def assert_rows_stand_alone(run: Callable[..., Tensor], *rows: Tensor, sizes: tuple[int, ...] = SIZES) -> None:
    """A row has the same bits alone, in batches of any size and offset, and in any order."""
    assert differing_windows(run, *rows, sizes=sizes) == []
    order = torch.randperm(rows[0].shape[0])
    assert same_bits(run(*(x[order] for x in rows)), run(*(x.clone() for x in rows))[order])


def gamma(terms: int, unit: float = U32) -> float:
    """Bound of the relative error of `terms` successive roundings; sums of so many terms in any order obey it."""
    return terms * unit / (1 - terms * unit)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """|got - exact| <= bound everywhere; exact and bound are float64."""
    assert got.shape == exact.shape
    assert bool(torch.isfinite(got).all())
    excess = (got.double() - exact).abs() - bound
    assert not excess.numel() or float(excess.max()) <= 0, f"{float(excess.max()):.3g} above the bound"


def displaced(x: Tensor, by: int) -> Tensor:
    """The same values, contiguous, `by` elements behind an aligned address."""
    store = torch.empty(x.numel() + by, dtype=x.dtype)
    store[by:] = x.flatten()
    return store[by:].view(x.shape)


def in_wider_rows(x: Tensor, before: int, behind: int) -> Tensor:
    """The same values as a slice of columns of a wider matrix."""
    wide = torch.zeros(x.shape[0], before + x.shape[1] + behind, dtype=x.dtype, device=x.device)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Another number of torch threads for a while: BLAS splits its work by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
