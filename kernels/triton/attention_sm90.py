# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Sparse MLA attention on Hopper: launch and byte counts of `attention_sm90_kernel`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from weft.kernels.gpu.base import Paged, check
from weft.kernels.layouts import RowLayout, kv_fp8

LOG2E = 1.4426950408889634
DIM = 512
HEADS = 64
SPLIT = 128
FILL_REGISTERS = 88


def supports(layout: RowLayout) -> bool:
    return layout == kv_fp8(layout.page, 448, 64) and layout.page_bytes % 64 == 0


@triton.jit
def merge(out, part, tops, totals, lengths, sink, heads, splits, SPLIT: tl.constexpr, DIM: tl.constexpr):
    """Grid (T, H): the mean of a query's parts, weighted by their totals, first to last."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + token)
    bias = tl.load(sink + head) * 1.4426950408889634
    gdc_wait()
    if length > SPLIT:
        used = tl.cdiv(length, SPLIT)
        at = token * splits * heads + head
        place = tl.arange(0, DIM)
        highest = bias
        for begin in range(0, used, 8):
            for step in tl.static_range(8):
                split = begin + step
                top = tl.load(tops + at + split * heads, mask=split < used, other=float("-inf"))
                highest = tl.maximum(highest, top)
        total = tl.exp2(bias - highest)
        acc = tl.zeros([DIM], tl.float32)
        for begin in range(0, used, 8):
            for step in tl.static_range(8):
                split = begin + step
                inside = split < used
                top = tl.load(tops + at + split * heads, mask=inside, other=float("-inf"))
                weight = tl.load(totals + at + split * heads, mask=inside, other=0.0) * tl.exp2(top - highest)
                row = tl.load(part + (at + split * heads) * DIM + place, mask=inside & (place < DIM), other=0.0)
                total += weight
                acc += row.to(tl.float32) * weight
        channel = place // 32 * 32 + place // 2 % 4 * 8 + place // 8 % 4 * 2 + place % 2
        tl.store(out + (token * heads + head) * DIM + channel, (acc / total).to(out.dtype.element_ty))


@cache
def multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sparse_attention(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    dtype: torch.dtype,
    registers: int = FILL_REGISTERS,
    blocks: int = 1 << 30,
    kernel: Any = None,
    merging: int = 2,
) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, checked there; q is float16 of 512 channels."""
    check(supports(pool.layout), pool.layout)
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from weft.kernels.triton.attention_sm90_kernel import sparse

    tokens, heads, dim = q.shape
    layout = pool.layout
    splits = max(1, triton.cdiv(index.shape[1], SPLIT))
    items = tokens * triton.cdiv(heads, HEADS) * splits
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    sums = tokens * splits * heads if splits > 1 else 1
    part = torch.empty(sums * dim, dtype=torch.float16, device=q.device)
    tops, totals = torch.empty(2, sums, dtype=torch.float32, device=q.device)
    rows = q.contiguous().view(-1, DIM)
    box = TensorDescriptor.from_tensor(rows, [HEADS, DIM], NVMMASharedLayout(128, 16, rank=2))
    launch: Any = kernel or sparse
    launch[(min(items, multiprocessors(q.device.index), blocks),)](
        box,
        pool.bytes.view(torch.int32),
        pool.bytes.view(torch.int64),
        index,
        lengths,
        sink,
        out,
        part,
        tops,
        totals,
        index.stride(0),
        heads,
        splits,
        items,
        scale * LOG2E,
        layout.page,
        layout.page_bytes,
        registers,
        num_warps=8,
    )
    if splits > 1 and merging:
        add: Any = merge
        add[tokens, heads](out, part, tops, totals, lengths, sink, heads, splits, SPLIT, DIM, num_warps=4, launch_pdl=merging > 1)
    return out
