"""Runs a Gluon kernel's own source on the CPU, its partitions interleaved at random (Triton cannot).

This module has what a kernel holds, `gluon_device` what it calls. Each partition is a thread, one of which runs at
a time; it hands over at every barrier operation. Copies and products are queued and take effect at a random later
moment: each TMA box and copy on its own, products and commits in the order of their issue. Until a copy lands, its
target is undefined. Shared memory is bytes, so that views of one allocation alias as they do on the device (by
lines; swizzling permutes a line and is left out). A product that reads what was stored without a fence fails, and
so does a state in which nothing can go on.

Not modelled: races between the threads of a partition, instruction selection, and limits of the hardware.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def raw(x: Any) -> Any:
    return x.x if isinstance(x, T) else x


class T:
    """A tensor, or a scalar, of a kernel."""

    def __init__(self, x: Any) -> None:
        self.x = x if isinstance(x, Tensor) else torch.tensor(x)
        self.type = SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> T:
        return T(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def reshape(self, shape: list[int]) -> T:
        return T(self.x.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> T:
        return T(self.x.permute(order))

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)


def _operator(name: str) -> Callable[[T, Any], T]:
    def apply(self: T, other: Any) -> T:
        return T(getattr(self.x, name)(raw(other)))

    return apply


_ARITHMETIC = ("add", "radd", "rsub", "sub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv")
_LOGIC = ("mod", "rmod", "and", "rshift", "lshift", "lt", "gt", "le", "ge", "eq", "ne")
for _name in _ARITHMETIC + _LOGIC:
    setattr(T, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """To elements of a tensor, and to what lies behind it in its storage."""

    def __init__(self, data: Tensor, at: Any = 0) -> None:
        size = data.untyped_storage().size() // data.itemsize - data.storage_offset()
        self.data, self.at = data.as_strided((size,), (1,)), at
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + raw(offset))


class Descriptor:
    """Of a 2-D tensor in global memory; line: bytes of a line in shared memory."""

    def __init__(self, data: Tensor, box: tuple[int, int], line: int) -> None:
        self.data, self.box, self.dtype, self.layout = data, box, data.dtype, line
        self.nbytes_per_cta = math.prod(box) * data.itemsize


@dataclass
class Memory:
    """Shared memory: [..., rows, columns] in lines, all rows of a line's columns before those of the next.

    Without lines: numbers in a row. dirty: bytes stored by threads and not yet fenced; journal: what was stored.
    """

    cells: Tensor
    dirty: Tensor
    journal: list[Tensor]
    shape: list[int]
    dtype: torch.dtype
    line: int | None
    columns: tuple[int, int] | None = None
    transposed: bool = False

    def reinterpret(self, dtype: torch.dtype, shape: list[int], line: int) -> Memory:
        assert math.prod(shape) * dtype.itemsize == len(self.cells)
        return replace(self, dtype=dtype, shape=shape, line=line)

    def index(self, i: Any) -> Memory:
        size = len(self.cells) // self.shape[0]
        part = slice(int(i) * size, (int(i) + 1) * size)
        return replace(self, cells=self.cells[part], dirty=self.dirty[part], shape=self.shape[1:])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        assert dim == len(self.shape) - 1
        return replace(self, columns=(start, start + length))

    def permute(self, order: tuple[int, int]) -> Memory:
        assert order == (1, 0)
        return replace(self, transposed=True)

    def read(self) -> Tensor:
        columns = slice(*self.columns) if self.columns else slice(None)
        if self.line is None:
            return self.cells.view(self.dtype)[columns].clone()
        lines = self.cells.view(-1, self.shape[0], self.line).transpose(0, 1)
        tile = lines.reshape(self.shape[0], -1).view(self.dtype)[:, columns].clone()
        return tile.T if self.transposed else tile

    def write(self, x: Tensor) -> None:
        assert x.dtype == self.dtype and list(x.shape) == self.shape
        data = x.contiguous().view(-1).view(torch.uint8)
        if self.line is not None:
            data = data.view(self.shape[0], -1, self.line).transpose(0, 1).reshape(-1)
        self.cells.copy_(data)

    def load(self, layout: Any = None) -> T:
        return T(self.read())

    def store(self, x: T) -> None:
        self.write(x.x)
        self.dirty.fill_(True)
        self.journal.append(self.dirty)


class Accumulator:
    """Tensor memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: Any) -> Accumulator:
        return Accumulator(self.data[int(i)])

    def slice(self, start: int, length: int) -> Accumulator:
        return Accumulator(self.data[:, start : start + length])

    def get_reg_layout(self) -> None:
        return None

    def load(self) -> T:
        return T(self.data.clone())

    def store(self, x: T) -> None:
        self.data.copy_(x.x)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phases = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int = 1, expect: int = 0) -> None:
        assert self.left >= count, "more arrivals than the barrier counts"
        self.bytes += expect
        self.left -= count
        self.settle()

    def landed(self, size: int) -> None:
        self.bytes -= size
        self.settle()

    def settle(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.phases += 1
            self.left = self.count

    def passed(self, parity: int) -> bool:
        return self.phases % 2 != parity


class Barriers(list[Barrier]):
    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


class Partition:
    """A thread that runs when it is told to, until its next barrier operation."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done, self.error = False, None
        self.thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self.thread.start()

    def _run(self, run: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            run()
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def step(self) -> None:
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.ready = ready
        self.back.release()
        self.go.acquire()
