"""Corrections of Triton's interpreter, so that TRITON_INTERPRET=1 gives what a GPU gives, within rounding of exp.

Wrong in 3.6 to 3.9, without a word (measured against torch): arithmetic and products of bfloat16 work on the codes
as integers; float32 -> bfloat16 truncates; float32 -> e4m3 loses the carry into the exponent and does not
saturate; integers become bfloat16 by their bits; products in tf32 keep all of float32's bits. `install` mends
these, and silences numpy where a GPU is silent (inf - inf and the like). `traffic` counts the bytes that loads
and stores move, `launches` the kernels, and torch's own ops among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass
class Traffic:
    """Bytes that loads and stores moved; masked-off elements move none."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@dataclass
class Launches:
    """What would be a node of a CUDA graph: kernels by their names, torch's ops as "aten.add", in order."""

    names: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> list[str]:
        return [name for name in self.names if not name.startswith("aten.")]

    @property
    def torch_ops(self) -> list[str]:
        return [name for name in self.names if name.startswith("aten.")]


_meters: list[Traffic] = []
_counts: list[Launches] = []
# Of torch's ops, those that allocate or look only. Views are told by their schemas.
_SILENT = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "set_"}
_SILENT |= {"_reshape_alias", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "record_stream"}


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what kernels launched inside move. Needs `install`."""
    meter = Traffic()
    _meters.append(meter)
    try:
        yield meter
    finally:
        _meters.remove(meter)


@contextmanager
def launches() -> Iterator[Launches]:
    """Count the kernels launched inside, and torch's ops on tensors that are kernels on a GPU: not views, not
    allocations, not ops on no elements. One that waits for the device shows as aten._local_scalar_dense. Ops on
    what stays on the host count too, so keep those outside. Needs `install`."""
    count = Launches()
    with _TorchOps(count):
        _counts.append(count)
        try:
            yield count
        finally:
            _counts.remove(count)


class _TorchOps(TorchDispatchMode):
    def __init__(self, count: Launches) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        results = out if isinstance(out, (tuple, list)) else (out,)
        written = [x for x in (*results, *args) if isinstance(x, torch.Tensor)]
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        nothing = bool(written) and not any(x.numel() for x in written)
        if not (_interpreting or looks or nothing or name in _SILENT):
            self.count.names.append(f"aten.{name}")
        return out


# Launches under way: what the interpreter itself does with torch is no launch.
_interpreting: list[str] = []


def install() -> None:
    """Correct the interpreter of this process. Safe to call twice."""
    from triton.runtime import interpreter as ti

    builder = ti.InterpreterBuilder
    if getattr(builder, "weft_corrected", False):
        return
    builder.weft_corrected = True
    ti._convert_float = _convert_float
    _correct_arithmetic(ti)
    _correct_products(ti)
    _count_traffic(builder)
    run = ti.GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        for count in _counts:
            count.names.append(self.fn.__name__)
        _interpreting.append(self.fn.__name__)
        try:
            with np.errstate(all="ignore"):
                return run(self, *args, **kwargs)
        finally:
            _interpreting.pop()

    ti.GridExecutor.__call__ = quietly


def _values(data: Any, name: str) -> torch.Tensor:
    """Interpreter data of a floating type -> a tensor of that type."""
    bits = np.array(data, order="C")  # a copy: data may be a broadcast view
    return torch.from_numpy(bits.view(f"int{bits.itemsize * 8}")).view(_TORCH[name])


def _codes(x: torch.Tensor) -> Any:
    """A tensor -> its bits, as the interpreter's unsigned integers."""
    size = x.element_size() * 8
    signed = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    return x.contiguous().view(signed).numpy().view(_BITS[size])


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Round to nearest even, finite values to the largest finite e4m3 (cvt.rn.satfinite); bits in, bits out."""
    shape = np.shape(data)
    x = _values(np.atleast_1d(data), source.name)
    if target.name == "fp8e4nv":
        x = x.float().clamp(-448.0, 448.0)
    return _codes(x.to(_TORCH[target.name])).reshape(shape)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar.name == "bf16")


def _wide(handle: Any) -> Any:
    """bfloat16 or fp8 data in float32, others as they are."""
    name = handle.dtype.scalar.name
    if name not in ("bf16", "fp8e4nv", "fp8e5"):
        return handle.data
    data = np.atleast_1d(handle.data)
    return _values(data, name).float().numpy().reshape(np.shape(handle.data))


def _narrow(x: Any) -> Any:
    """float32 -> bfloat16 bits."""
    x = np.asarray(x, np.float32)
    return _codes(torch.from_numpy(np.atleast_1d(x).copy()).to(torch.bfloat16)).reshape(x.shape)


def _correct_arithmetic(ti: Any) -> None:
    import triton.language as tl

    builder = ti.InterpreterBuilder
    binary, unary, cast = builder.binary_op, builder.unary_op, builder.cast_impl

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        out = op(_wide(lhs), _wide(rhs))
        if out.dtype == np.bool_:
            return ti.TensorHandle(out, tl.int1)
        return ti.TensorHandle(_narrow(out), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if not _is_bf16(arg):
            return unary(self, arg, op)
        return ti.TensorHandle(_narrow(op(_wide(arg))), tl.bfloat16)

    def cast_impl(self: Any, src: Any, target: Any) -> Any:
        if _is_bf16(src) and target.scalar.name != "bf16":
            return cast(self, ti.TensorHandle(_wide(src), tl.float32), target)
        if target.scalar.name == "bf16" and not _is_bf16(src):
            return ti.TensorHandle(_narrow(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, target)

    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op, unary_op, cast_impl


def _correct_products(ti: Any) -> None:
    builder = ti.InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        left, right = _wide(a), _wide(b)
        if a.dtype.scalar.name == "fp32" and str(precision).endswith("TF32"):
            left, right = _tf32(left), _tf32(right)
        product = np.matmul(left, right, dtype=d.data.dtype)
        return ti.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def _tf32(x: Any) -> Any:
    """Nearest values of 10 mantissa bits, ties away from zero: what cvt.rna.tf32 gives."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _elements(ptrs: Any, mask: Any) -> int:
    return int(np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape)))


def _count_traffic(builder: Any) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        out = load(self, ptrs, mask, *rest)
        for meter in _meters:
            meter.loaded += _elements(ptrs, mask) * out.data.itemsize
        return out

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for meter in _meters:
            meter.stored += _elements(ptrs, mask) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
