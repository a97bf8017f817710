"""Row-invariant linear: row i of `x @ w.T` has the same bits whatever other rows are in the call.

BLAS picks another kernel, with another summation order, for one row than for many, and edge rows of a tile
may differ too. Two ways keep the bits fixed and cost little: rows padded to a multiple of the tile height,
or weights prepacked by oneDNN. For small float32 weights the padded product is numpy's: its BLAS multiplies a
few rows without repacking the weight, and a call of it costs less. Which of them holds depends on processor,
dtype and weight shape, so `choose` tries them on the shape itself, once per process, and takes the first that
proves invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Method = Literal["numpy", "padded", "packed", "single"]
Array = NDArray[np.float32]
Index = NDArray[np.int64]

# Batch sizes tried by the self-check: around the tile heights of known BLAS kernels, and where they change plan.
_CHECK_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33, 48, 63, 65, 100, 128, 255, 256, 511, 1000)
_CHECK_ROWS_LARGE = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 128)
_CHECK_OFFSETS = (0, 1, 3)
_DISTINCT_ROWS = 68
# From this many weight elements on, reading the weights dominates and prepacking wins at few rows.
_PACK_FROM = 1 << 18
# BLAS kernels may treat data by the alignment of its address, so inputs and weights start at such a multiple.
_ALIGNMENT = 64
# numpy's BLAS treats the last columns of a weight like any other if there are a multiple of 16, and sums in one
# order whatever the number of rows if no more than this many terms are summed in a call.
_COLUMNS = 16
_TERMS = 384


@dataclass(frozen=True)
class LinearPlan:
    """How one weight shape is multiplied; printable."""

    method: Method
    row_multiple: int

    def __str__(self) -> str:
        return f"{self.method}/{self.row_multiple}"


def fast(n: int, k: int, dtype: torch.dtype) -> LinearPlan:
    """The quickest plan that makes no promise: rows are not padded."""
    return LinearPlan("numpy" if dtype == torch.float32 and n * k < _PACK_FROM else "padded", 1)


class Linear:
    """`y = x @ weight.T`, bitwise independent of the number and order of rows.

    weight: [N, K] float32 or bfloat16; not modified, not referenced any more once prepacked.
    deterministic: False takes the library's kernel as it is: faster for few rows, and a row's last bits then
    depend on how many rows are in the call.
    """

    def __init__(self, weight: Tensor, *, deterministic: bool = True) -> None:
        assert weight.dim() == 2 and weight.dtype in (torch.float32, torch.bfloat16), weight.shape
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        weight = _aligned(weight)
        size = self.out_features, self.in_features
        threads = torch.get_num_threads()
        self.plan = choose(*size, weight.dtype, threads) if deterministic else fast(*size, weight.dtype)
        self._run_array: Callable[[Array], Array] | None = None
        if self.plan.method == "numpy":
            self._run_array = _numpy_runner(self.plan.row_multiple, weight)
            self._run = _on_tensors(self._run_array)
        else:
            self._run = _runner(self.plan, weight)

    def array(self, x: Array) -> Array:
        """The same on arrays: [T, K] float32 -> [T, N] float32, rounded to the weight's dtype on the way."""
        if self._run_array is not None and len(x):
            return self._run_array(x)
        out: Array = self(torch.from_numpy(x)).float().numpy()
        return out

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N] in the weight's dtype; x is cast to it. T may be 0."""
        assert x.dim() == 2 and x.shape[1] == self.in_features, (x.shape, self.in_features)
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        return self._run(_aligned(x))


def _aligned(x: Tensor) -> Tensor:
    """x itself, or a contiguous copy at an aligned address."""
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _numpy_runner(multiple: int, weight: Tensor) -> Callable[[Array], Array]:
    """On arrays: [T, K] float32 -> [T, N]."""
    n, k = weight.shape
    columns = torch.zeros(k, -(-n // _COLUMNS) * _COLUMNS)
    columns[:, :n] = weight.t()
    whole = columns.numpy()
    bounds = np.linspace(0, k, -(-k // _TERMS) + 1).astype(int).tolist()
    first, *others = (slice(*pair) for pair in pairwise(bounds))

    def run(x: Array) -> Array:
        rows = len(x)
        if rows % multiple:
            padded = np.zeros((rows + -rows % multiple, k), np.float32)
            padded[:rows] = x
            x = padded
        out: Array = x[:, first] @ whole[first]
        for part in others:
            out += x[:, part] @ whole[part]
        return out[:rows, :n]

    return run


def _on_tensors(run: Callable[[Array], Array]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(run(x.numpy()))


def _runner(plan: LinearPlan, weight: Tensor) -> Callable[[Tensor], Tensor]:
    if plan.method == "numpy":
        return _on_tensors(_numpy_runner(plan.row_multiple, weight))
    if plan.method == "packed":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

        def run_packed(x: Tensor) -> Tensor:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")
            return out

        return run_packed
    if plan.method == "single":
        return lambda x: torch.cat([F.linear(_aligned(row), weight) for row in x.split(1)])
    multiple, columns = plan.row_multiple, weight.t()

    def run_padded(x: Tensor) -> Tensor:
        rows = x.shape[0]
        missing = -rows % multiple
        if missing == 0:
            return torch.mm(x, columns)
        if rows == 1:  # a view of the row instead of a padded copy: other rows of the tile do not matter
            return torch.mm(x.expand(multiple, -1), columns)[:1]
        return torch.mm(F.pad(x, (0, 0, 0, missing)), columns)[:rows]

    return run_padded


def candidates(n: int, k: int, dtype: torch.dtype) -> list[LinearPlan]:
    """Plans in order of preference for an [n, k] weight. The last one, row by row, always holds."""
    arrays = [LinearPlan("numpy", m) for m in (2, 4)] if dtype == torch.float32 else []
    padded = [LinearPlan("padded", m) for m in (4, 8, 16)]
    packed = [LinearPlan("packed", 1)] if torch.backends.mkldnn.is_available() else []
    ordered = [*packed, *padded] if n * k >= _PACK_FROM else [*arrays, *padded, *packed]
    return [*ordered, LinearPlan("single", 1)]


@cache
def choose(n: int, k: int, dtype: torch.dtype, threads: int) -> LinearPlan:
    """The first candidate that is row-invariant for this shape on this machine.

    `threads` is part of the key because BLAS partitions by it.
    """
    # A check needs enough columns to meet every kernel, not all of a 129,280-row head.
    rows = min(n, 4096)
    sizes = _CHECK_ROWS if rows * k < _PACK_FROM else _CHECK_ROWS_LARGE
    draws = [_draw(rows, k, dtype, cancelling) for cancelling in (False, True)]
    for plan in candidates(n, k, dtype):
        if plan.method == "single" or all(_is_row_invariant(_runner(plan, w), x, sizes) for w, x in draws):
            return plan
    raise AssertionError("unreachable: the last candidate always holds")


def _draw(n: int, k: int, dtype: torch.dtype, cancelling: bool) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and rows to multiply. With `cancelling`, two huge terms of each product cancel, so that the
    result shows the rounding of every partial sum, which bfloat16 would otherwise hide in its own."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + k)
    weight = torch.randn(n, k, generator=generator) * k**-0.5
    x = torch.randn(_DISTINCT_ROWS, k, generator=generator)
    if cancelling and k > 1:
        first, second = torch.randperm(k, generator=generator)[:2].tolist()
        weight[:, second] = weight[:, first]
        x[:, first] *= 2.0**16 if dtype == torch.bfloat16 else 2.0**8
        x[:, second] = -x[:, first]
    return weight.to(dtype), x.to(dtype)


def _is_row_invariant(run: Callable[[Tensor], Tensor], x: Tensor, sizes: tuple[int, ...]) -> bool:
    alone = torch.cat([run(row.clone()) for row in x.split(1)])
    for size in sizes:
        for offset in _CHECK_OFFSETS:
            chosen = torch.arange(offset, offset + size) % len(x)
            if not torch.equal(run(x.index_select(0, chosen)), alone.index_select(0, chosen)):
                return False
    return True
