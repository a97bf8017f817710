"""What Hopper's Gluon has beside `support.gluon_device`: warp group products, inline assembly, barriers by layout.

A product of a warp group leaves its sums in registers, but later: nothing may read them before a wait for all
products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from support.gluon import Barrier, Barriers, Pointer, T, raw
from support.gluon_device import UNDEFINED, Device


@dataclass
class Tile:
    """Shared memory as rows of bytes, all views with lines of 128 bytes, so that they permute bytes alike.

    dirty: bytes stored by threads and not yet fenced; journal: what was stored.
    """

    cells: Tensor
    dirty: Tensor
    journal: list[Tensor]
    dtype: torch.dtype
    transposed: bool = False

    def reinterpret(self, dtype: torch.dtype, shape: list[int], line: int) -> Tile:
        assert self.cells.shape == (shape[0], shape[1] * dtype.itemsize) and line == 128
        return replace(self, dtype=dtype)

    def slice(self, start: int, length: int, dim: int) -> Tile:
        size = self.dtype.itemsize if dim else 1
        part = dim, start * size, length * size
        assert not self.transposed and (start + length) * size <= self.cells.shape[dim]
        return replace(self, cells=self.cells.narrow(*part), dirty=self.dirty.narrow(*part))

    def permute(self, order: tuple[int, int]) -> Tile:
        assert order == (1, 0)
        return replace(self, transposed=not self.transposed)

    def read(self) -> Tensor:
        tile = self.cells.clone(memory_format=torch.contiguous_format).view(self.dtype)
        return tile.T if self.transposed else tile

    def write(self, x: Tensor) -> None:
        data = x.contiguous().view(torch.uint8)
        assert x.dtype == self.dtype and data.shape == self.cells.shape and not self.transposed
        self.cells.copy_(data)

    def store(self, x: T) -> None:
        self.write(x.x)
        self.dirty.fill_(True)
        self.journal.append(self.dirty)


class Sums(T):
    """The registers that a product in flight writes."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.type = SimpleNamespace(layout=None)

    @property
    def x(self) -> Tensor:
        raise AssertionError("sums are read while their products are in flight")


class Hopper(Device):
    """Runs a kernel with one partition that issues products."""

    grid: tuple[int, ...]

    def run(self, kernel: Callable[..., None], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.grid = grid
        super().run(kernel, grid, arguments)

    @staticmethod
    def skipped(*arguments: Any, **named: Any) -> Any:
        """A wait passes on what it waits for."""
        return arguments[1][0] if len(arguments) == 2 and isinstance(arguments[1], list) else None

    def language(self) -> SimpleNamespace:
        plain = super().language()

        def load(pointer: Pointer, mask: T | None = None, other: float = 0, eviction_policy: str = "") -> T:
            if mask is not None and not mask.x.any():  # there may be nothing to point at
                return T(torch.full(torch.as_tensor(pointer.at).shape, other, dtype=pointer.data.dtype))
            return plain.load(pointer, mask, other)

        def shared(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
            if layout == "barrier":
                return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
            assert layout == 128
            cells = torch.full((shape[0], shape[1] * dtype.itemsize), UNDEFINED, dtype=torch.uint8)
            return Tile(cells, torch.zeros(cells.shape, dtype=torch.bool), self.journal, dtype)

        def expand_dims(x: Any, axis: int) -> Any:
            if isinstance(x, Pointer):
                return Pointer(x.data, x.at.unsqueeze(axis))
            return plain.expand_dims(x, axis)

        mine = {
            "load": load,
            "allocate_shared_memory": shared,
            "expand_dims": expand_dims,
            "zeros": lambda shape, dtype, layout: T(torch.zeros(shape, dtype=dtype)),
            "join": lambda a, b: T(torch.stack((a.x, b.x), -1)),
            "convert_layout": lambda x, layout: x,
            "num_programs": lambda axis: self.grid[axis],
            "inline_asm_elementwise": inline_asm_elementwise,
            "NVMMASharedLayout": lambda line, bits, rank: line,
            "NVMMADistributedLayout": lambda *a: None,
        }
        return SimpleNamespace(**{**vars(plain), **mine})

    def barriers(self) -> SimpleNamespace:
        plain = super().barriers()

        def arrive(barrier: Barrier, count: int) -> None:
            barrier.arrive(count)
            self.pause()

        return SimpleNamespace(**{**vars(plain), "arrive": arrive, "MBarrierLayout": lambda: "barrier"})

    def namespace(self) -> SimpleNamespace:
        """With what the kernel names itself, by the version of Triton, and what does nothing here."""
        return SimpleNamespace(
            fence_async_shared=super().namespace().fence_async_shared,
            warpgroup_mma=self.multiply,
            warpgroup_mma_wait=self.wait,
            load_box=self.tma().async_load,
            synchronise=lambda: None,
            gdc_launch_dependents=lambda: None,
        )

    def multiply(self, a: Tile, b: Tile, acc: T, use_acc: bool, is_async: bool = False) -> T:
        to = Sums()

        def product() -> None:
            assert not a.dirty.any() and not b.dirty.any(), "a product reads what was not fenced"
            assert a.dtype == b.dtype == torch.float16
            value = a.read().float() @ b.read().float()
            before = acc.value if isinstance(acc, Sums) else acc.x  # products are done in order
            assert before is not None and before.shape == value.shape
            to.value = before + value if use_acc else value

        self.products.append(product)
        return to if is_async else self.wait(0, [to])

    def wait(self, outstanding: int, values: list[T]) -> T:
        self.pause(lambda: len(self.products) <= outstanding)
        (sums,) = values
        return T(sums.value) if isinstance(sums, Sums) and outstanding == 0 else sums


def packed(pairs: Tensor) -> Tensor:
    """[..., 2] float16 -> [...] int32, the first in the low half."""
    return pairs.contiguous().view(torch.int32).squeeze(-1)


def power(exponent: Tensor) -> Tensor:
    half = exponent.contiguous().view(torch.float32).to(torch.float16)
    return packed(torch.stack((half, half), -1))


def four_codes(codes: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    values = codes.contiguous().view(torch.float8_e4m3fn).to(torch.float16).view(*codes.shape, 2, 2)
    scaled = values * factor.contiguous().view(torch.float16).view(*factor.shape, 1, 2)
    return packed(scaled[..., 0, :]), packed(scaled[..., 1, :])


def two_plain(pairs: Tensor) -> Tensor:
    return packed(pairs.contiguous().view(torch.bfloat16).view(*pairs.shape, 2).float().to(torch.float16))


# What each text computes, by the PTX manual: `cvt.rn.f16x2.f32 d, a, b` puts a in the upper half; `mov.b32 {a, b}`
# takes the lower half first.
ASSEMBLY: dict[tuple[str, str], Callable[..., Any]] = {
    ("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r"): power,
    (
        "{ .reg .b16 a, b; .reg .b32 c, d; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 c, a; "
        "cvt.rn.f16x2.e4m3x2 d, b; mul.rn.f16x2 $0, c, $3; mul.rn.f16x2 $1, d, $3; }",
        "=r,=r,r,r",
    ): four_codes,
    (
        "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; cvt.rn.f16x2.f32 $0, b, a; }",
        "=r,r",
    ): two_plain,
}


def inline_asm_elementwise(
    text: str, constraints: str, arguments: list[T], dtype: Any, is_pure: bool, pack: int
) -> Any:
    known = " ".join(text.split()), constraints
    assert known in ASSEMBLY and is_pure and pack == 1, f"no meaning is known for {text!r}"
    values = [raw(x) for x in arguments]
    assert all(x.dtype == torch.int32 for x in values)
    result = ASSEMBLY[known](*values)
    many = isinstance(result, tuple)
    assert dtype == ((torch.int32,) * len(result) if many else torch.int32)
    return tuple(map(T, result)) if many else T(result)
