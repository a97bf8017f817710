"""Linears on device tensors.

On CPU tensors they can be row-invariant (`weft.kernels.linear`), so that tests can tell exactly whether rows of a
step influence each other. cuBLAS sums differently for other numbers of rows, and makes no such promise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels import linear as host


class Linear:
    """`y = x @ weight.T`. weight: [N, K] float32 or bfloat16, on any device."""

    def __init__(self, weight: Tensor, *, deterministic: bool) -> None:
        self.dtype = weight.dtype
        self._run: Callable[[Tensor], Tensor]
        if weight.device.type == "cpu":
            self._run = host.Linear(weight, deterministic=deterministic)
        else:
            assert not deterministic, "products of cuBLAS depend on the number of rows"
            self._run = partial(F.linear, weight=weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K], cast to the weight's dtype -> [T, N] in it."""
        return self._run(x.to(self.dtype))


class GroupedLinear:
    """A block-diagonal linear: `groups` blocks of a weight [G * R, K], each on its own part of x."""

    def __init__(self, weight: Tensor, groups: int, *, deterministic: bool) -> None:
        self.dtype = weight.dtype
        self._weight: Tensor | None = None
        self._parts: list[Linear] = []
        if weight.device.type == "cpu":
            self._parts = [Linear(part, deterministic=deterministic) for part in weight.chunk(groups)]
        else:
            assert not deterministic, "products of cuBLAS depend on the number of rows"
            self._weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, G, K] -> [T, G * R] in the weight's dtype."""
        x = x.to(self.dtype)
        if self._weight is None:
            return torch.cat([part(x[:, i]) for i, part in enumerate(self._parts)], 1)
        return torch.bmm(x.transpose(0, 1), self._weight).transpose(0, 1).flatten(1)
