"""Pages or slots of many tensors copied in one launch, through a table of their addresses."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase

if TYPE_CHECKING:
    from weft.kernels.gpu.copies import PageTable

# Bytes of a program: four 16-byte accesses of every thread.
_CHUNK = 8192
_WARPS = 4


@triton.jit
def _copy_pages(
    addresses, strides, sizes, source, target, WORD: tl.constexpr, ITEM: tl.constexpr, COUNT: tl.constexpr
):
    """Program (i, l, c): chunk c of page i in tensor l.

    WORD: bytes that divide every address and size; ITEM: bytes of an element; COUNT: elements of a chunk.
    """
    old = tl.load(source + tl.program_id(0)).to(tl.int64)
    new = tl.load(target + tl.program_id(0)).to(tl.int64)
    tensor = tl.program_id(1)
    size = tl.load(sizes + tensor)
    address = tl.load(addresses + tensor)
    stride = tl.load(strides + tensor)
    if (old >= 0) & (new >= 0):
        element: tl.constexpr = tl.int32 if ITEM == 4 else tl.int16 if ITEM == 2 else tl.int8
        kind: tl.constexpr = tl.pointer_type(element)
        item = tl.program_id(2) * COUNT + tl.arange(0, COUNT)
        # An address that was read from memory says nothing of its alignment to the compiler.
        first = tl.max_contiguous(tl.multiple_of((address + old * stride).to(kind) + item, WORD), COUNT)
        second = tl.max_contiguous(tl.multiple_of((address + new * stride).to(kind) + item, WORD), COUNT)
        # Compared in words, so that the bound splits no access.
        mask = item // (WORD // ITEM) < size // WORD
        tl.store(second, tl.load(first, mask=mask), mask=mask)


def copy_pages(pools: PageTable, source: Tensor, target: Tensor) -> None:
    """See `weft.kernels.gpu.copies.copy_pages`."""
    grid = (source.numel(), len(pools.tensors), triton.cdiv(pools.largest, _CHUNK))
    item = min(pools.word, 4)
    _copy_pages[grid](
        pools.addresses,
        pools.strides,
        pools.sizes,
        source,
        target,
        WORD=pools.word,
        ITEM=item,
        COUNT=_CHUNK // item,
        num_warps=_WARPS,
    )


def aot() -> tuple[AotCase, ...]:
    """Pages whose bytes are a multiple of 16, as V4's are."""
    signature = {"addresses": "*i64", "strides": "*i64", "sizes": "*i64", "source": "*i32", "target": "*i32"}
    constants = {"WORD": 16, "ITEM": 4, "COUNT": _CHUNK // 4}
    wide = (r"ld\.global\.v4", r"st\.global\.v4")
    full = signature | dict.fromkeys(constants, "constexpr")
    return (
        AotCase("copy_pages", _copy_pages, full, constants, warps=_WARPS, expect={"sm90": wide, "sm100": wide}),
    )
