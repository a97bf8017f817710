"""The device on which `support.gluon` runs a kernel: its functions by name, its queues and its scheduler."""

from __future__ import annotations

import inspect
import math
import random
from collections import deque
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from support.gluon import Accumulator, Barrier, Barriers, Descriptor, Memory, Partition, Pointer, T, raw

UNDEFINED = 0x7F  # NaN in e4m3 and float16, 3e38 in bfloat16
TYPES = ("uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32")


class Device:
    """Runs one program at a time; `seed` decides the interleaving.

    without: (function, call, n): the n-th such call in the function's source does nothing.
    """

    def __init__(self, seed: int, without: tuple[str, str, int] | None = None) -> None:
        self.random = random.Random(seed)
        self.newest_first = self.random.random() < 0.5
        self.without = without
        self.copies: list[Callable[[], None]] = []
        self.products: deque[Callable[[], None]] = deque()
        self.journal: list[Tensor] = []  # stored since the last hand-over
        self.unfenced: dict[Partition | None, list[Tensor]] = {}
        self.current: Partition | None = None
        self.program: tuple[int, ...] = ()

    def run(self, kernel: Callable[..., None], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Every program of the grid of a kernel that is one of `functions`, with a launch's arguments."""
        values = tuple(map(self.argument, arguments))
        for number in range(math.prod(grid)):
            self.program = tuple(number // math.prod(grid[:i]) % grid[i] for i in range(len(grid)))
            kernel(*values)
            assert not self.copies and not self.products, "a program ended before its copies or products"

    @staticmethod
    def argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(value)
        if hasattr(value, "block_shape"):
            return Descriptor(value.base, tuple(value.block_shape), value.layout.swizzle_byte_width)
        return value

    def functions(self, modules: list[ModuleType]) -> dict[str, Any]:
        """The modules' functions with this device in place of Gluon."""
        names: dict[str, Any] = {**vars(self.namespace()), "range": lambda *a: range(*map(int, a))}
        names |= {
            "gl": self.language(),
            "mbarrier": self.barriers(),
            "tma": self.tma(),
            "async_copy": self.async_copy(),
            "skipped": self.skipped,
        }
        for module in modules:
            for name, value in vars(module).items():
                if type(value).__name__ == "constexpr":
                    names[name] = value.value
                elif type(value).__name__ == "GluonJITFunction" and name not in names:
                    names[name] = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        if self.without is not None:
            function, call, number = self.without
            source = next(inspect.getsource(vars(m)[function].fn) for m in modules if function in vars(m))
            pieces = ("from __future__ import annotations\n" + source.replace("@gluon.jit\n", "")).split(
                call + "("
            )
            pieces[number : number + 2] = [pieces[number] + "skipped(" + pieces[number + 1]]
            exec((call + "(").join(pieces), names)
        return names

    @staticmethod
    def skipped(*arguments: Any, **named: Any) -> Any:
        """Called in place of what the kernel runs `without`."""
        return None

    # What runs when.

    def specialize(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        partitions = [Partition(lambda f=f, a=a: f(*a)) for f, a in functions]
        while not all(p.done for p in partitions) or self.copies or self.products:
            able: list[Any] = [p for p in partitions if not p.done and p.ready()]
            able += ["copy"] * len(self.copies) + ["product"] * bool(self.products)
            assert able, "deadlock"
            pick = self.random.choice(able)
            if pick == "copy":
                self.copies.pop(-1 if self.newest_first else self.random.randrange(len(self.copies)))()
            elif pick == "product":
                self.products.popleft()()
            else:
                self.current = pick
                pick.step()
                self.current = None

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.unfenced.setdefault(self.current, []).extend(self.journal)
        self.journal.clear()
        if self.current is not None:
            self.current.pause(ready)

    # The functions of Gluon, by module.

    def language(self) -> SimpleNamespace:
        def load(pointer: Pointer, mask: T | None = None, other: float = 0) -> T:
            at = torch.as_tensor(pointer.at)
            if mask is None:
                return T(pointer.data[at])
            inside = mask.x.expand(at.shape)
            return T(torch.where(inside, pointer.data[torch.where(inside, at, 0)], other))

        def store(pointer: Pointer, value: T, mask: T) -> None:
            inside = mask.x.expand(pointer.at.shape)
            pointer.data[pointer.at[inside]] = value.x[inside]

        def reduce(function: Callable[..., Tensor]) -> Callable[[T, int], T]:
            return lambda x, axis: T(function(x.x, axis))

        def both(function: Callable[..., Tensor]) -> Callable[[Any, Any], T]:
            return lambda a, b: T(function(*(torch.as_tensor(raw(x)) for x in (a, b))))

        def shared(dtype: torch.dtype, shape: list[int], line: int | None) -> Memory:
            cells = torch.full((math.prod(shape) * dtype.itemsize,), UNDEFINED, dtype=torch.uint8)
            return Memory(cells, torch.zeros(len(cells), dtype=torch.bool), self.journal, shape, dtype, line)

        types = {name: getattr(torch, name) for name in TYPES}
        return SimpleNamespace(
            **types,
            float8e4nv=torch.float8_e4m3fn,
            load=load,
            store=store,
            max=reduce(torch.amax),
            sum=reduce(torch.sum),
            maximum=both(torch.maximum),
            minimum=both(torch.minimum),
            where=lambda c, a, b: T(torch.where(torch.as_tensor(raw(c)), raw(a), raw(b))),
            exp2=lambda x: T(torch.exp2(x.x)),
            full=lambda shape, value, dtype, layout: T(torch.full(shape, value, dtype=dtype)),
            arange=lambda begin, end, layout: T(torch.arange(begin, end, dtype=torch.int32)),
            expand_dims=lambda x, axis: T(x.x.unsqueeze(axis)),
            cdiv=lambda a, b: T(-(-torch.as_tensor(raw(a)) // raw(b))),
            program_id=lambda axis: T(torch.tensor(self.program[axis], dtype=torch.int32)),
            num_warps=lambda: 1,
            static_range=range,
            barrier=lambda: None,
            BlockedLayout=lambda *a: None,
            SliceLayout=lambda *a: None,
            SwizzledSharedLayout=lambda *a: None,
            allocate_shared_memory=shared,
            warp_specialize=self.specialize,
        )

    def namespace(self) -> SimpleNamespace:
        def fence() -> None:
            for dirty in self.journal + self.unfenced.pop(self.current, []):
                dirty.fill_(False)
            self.journal.clear()

        def tcgen05_mma(a: Memory, b: Memory, to: Accumulator, use_acc: Any) -> None:
            add = bool(use_acc)

            def product() -> None:
                assert not a.dirty.any() and not b.dirty.any(), "a product reads what was not fenced"
                assert a.dtype == b.dtype
                value = a.read().float() @ b.read().float()
                to.data.copy_(to.data + value if add else value)

            self.products.append(product)

        return SimpleNamespace(
            TensorMemoryLayout=lambda *a, **k: None,
            allocate_tensor_memory=lambda dtype, shape, layout: Accumulator(
                torch.full(shape, torch.nan, dtype=dtype)
            ),
            fence_async_shared=fence,
            tcgen05_mma=tcgen05_mma,
            tcgen05_commit=lambda barrier: self.products.append(barrier.arrive),
        )

    def barriers(self) -> SimpleNamespace:
        def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
            parity = int(phase)
            if pred:
                self.pause(lambda: barrier.passed(parity))

        def expect(barrier: Barrier, size: int, pred: Any = True) -> None:
            if pred:
                barrier.arrive(expect=size)
            self.pause()

        def arrive(barrier: Barrier) -> None:
            barrier.arrive()
            self.pause()

        return SimpleNamespace(
            allocate_mbarrier=lambda batch=None: Barriers(Barrier() for _ in range(batch)) if batch else Barrier(),
            init=lambda barrier, count: barrier.init(count),
            wait=wait,
            expect=expect,
            arrive=arrive,
        )

    def land(self, to: Memory, value: Tensor, done: Callable[[], None]) -> None:
        """`to` is undefined from now on, and holds `value` some time later."""
        to.cells.fill_(UNDEFINED)

        def copy() -> None:
            to.write(value)
            done()

        self.copies.append(copy)

    def tma(self) -> SimpleNamespace:
        def load(source: Descriptor, at: list[Any], barrier: Barrier, to: Memory, pred: Any = True) -> None:
            if not pred:
                return
            rows = torch.arange(source.box[0]) + int(at[0])
            box = torch.zeros(source.box, dtype=source.dtype)  # zeros beyond the tensor
            box[rows < len(source.data)] = source.data[
                rows[rows < len(source.data)], int(at[1]) : int(at[1]) + source.box[1]
            ]
            self.land(to, box, lambda: barrier.landed(source.nbytes_per_cta))

        def gather(source: Descriptor, rows: T, column: int, barrier: Barrier, to: Memory) -> None:
            assert (rows.x >= 0).all() and (rows.x < len(source.data)).all()
            value = source.data[rows.x.long(), column : column + source.box[1]]
            self.land(to, value, lambda: barrier.landed(value.numel() * value.itemsize))

        return SimpleNamespace(async_load=load, async_gather=gather)

    def async_copy(self) -> SimpleNamespace:
        issued: list[list[Callable[[], None]]] = [[]]

        def load(to: Memory, pointer: Pointer, mask: T) -> None:
            value = torch.where(mask.x, pointer.data[torch.where(mask.x, pointer.at, 0)], 0)
            then: list[Callable[[], None]] = []
            issued[0] = then
            self.land(to, value, lambda: then[0]())

        def arrive(barrier: Barrier, increment_count: bool) -> None:
            assert not increment_count
            issued[0].append(lambda: barrier.arrive(32))  # every thread of the warp, once its copy is done

        return SimpleNamespace(async_load=load, mbarrier_arrive=arrive)
