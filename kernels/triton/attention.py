# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Sparse MLA attention in Triton: each query over its own list of quantised rows, with a sink.

One program takes one query, a block of heads and one split of the query's columns, in tiles of BLOCK columns, left
to right. A tile of rows is dequantised to float16: e4m3 times a power of two is exact there for scales 2^-15 to
2^7 (a channel of up to 57,344), and one conversion and one product per pair are cheaper than the way to bfloat16
(no direct conversion on Hopper). The bfloat16 channels of a row lie behind its codes and fill the rest of the same
tile, so that one product serves all channels.

Two orientations: heads as rows of the products (64 heads and more), or keys as rows ("swapped"), so that few heads
do not pad a 64-row matrix instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import kv_fp8, kv_fp8_v41
from weft.kernels.triton.attention_parts import merge as merge
from weft.kernels.triton.attention_parts import rows_tile, sizes, turns

LOG2E = 1.4426950408889634


@triton.jit
def with_sink(top, total, bias):
    """The factor that makes an output of a list's sums, the sink being one more logit."""
    highest = tl.maximum(top, bias)
    share = tl.exp2(top - highest)
    # Where nothing has weight, a sink of -inf included, both differences are NaN.
    return tl.where(total > 0, share / (total * share + tl.exp2(bias - highest)), 0.0)


@triton.jit
def attend(
    q,
    pool,
    plain,
    index,
    lengths,
    sink,
    out,
    part,
    tops,
    totals,
    q_token,
    q_head,
    index_token,
    heads,
    splits,
    scale,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Grid (T, head blocks, splits). Heads are rows of the products."""
    CHANNELS: tl.constexpr = LAYOUT[6]
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + token)
    begin = split * SPLIT
    if (begin < length) | (split == 0):
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        channel = tl.arange(0, LAYOUT[7] * LAYOUT[8])
        present = (head < heads)[:, None] & (channel < CHANNELS)[None, :]
        query = tl.load(q + token * q_token + head[:, None] * q_head + channel[None, :], mask=present, other=0.0)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, LAYOUT[7] * LAYOUT[8]], tl.float32)
        end = tl.minimum(begin + SPLIT, length)
        for first in range(begin, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            row = tl.load(index + token * index_token + column, mask=column < end, other=-1)
            keys = rows_tile(pool, plain, row, row >= 0, LAYOUT)
            logits = tl.dot(query, tl.trans(keys)) * scale
            logits = tl.where((row >= 0)[None, :], logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(logits - base[:, None])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(tl.float16), keys, acc * decay[:, None])
            top = higher
        at = (token * splits + split) * heads + head
        bias = tl.load(sink + head, mask=head < heads, other=0.0) * 1.4426950408889634
        target = (token * heads + head)[:, None] * CHANNELS + channel[None, :]
        if length <= SPLIT:
            weight = with_sink(top, total, bias)
            tl.store(out + target, (acc * weight[:, None]).to(out.dtype.element_ty), mask=present)
        else:
            tl.store(part + at[:, None] * CHANNELS + channel[None, :], acc, mask=present)
            tl.store(tops + at, top, mask=head < heads)
            tl.store(totals + at, total, mask=head < heads)


@triton.jit
def attend_swapped(
    q,
    pool,
    plain,
    index,
    lengths,
    sink,
    out,
    part,
    tops,
    totals,
    q_token,
    q_head,
    index_token,
    heads,
    splits,
    scale,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The same with keys, then channels, as rows of the products."""
    CHANNELS: tl.constexpr = LAYOUT[6]
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + token)
    begin = split * SPLIT
    if (begin < length) | (split == 0):
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        channel = tl.arange(0, LAYOUT[7] * LAYOUT[8])
        present = (channel < CHANNELS)[:, None] & (head < heads)[None, :]
        query = tl.load(q + token * q_token + head[None, :] * q_head + channel[:, None], mask=present, other=0.0)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([LAYOUT[7] * LAYOUT[8], HEADS], tl.float32)
        end = tl.minimum(begin + SPLIT, length)
        for first in range(begin, end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            row = tl.load(index + token * index_token + column, mask=column < end, other=-1)
            keys = rows_tile(pool, plain, row, row >= 0, LAYOUT)
            logits = tl.dot(keys, query) * scale
            logits = tl.where((row >= 0)[:, None], logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(logits - base[None, :])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(weights, 0)
            acc = tl.dot(tl.trans(keys), weights.to(tl.float16), acc * decay[None, :])
            top = higher
        at = (token * splits + split) * heads + head
        bias = tl.load(sink + head, mask=head < heads, other=0.0) * 1.4426950408889634
        target = (token * heads + head)[None, :] * CHANNELS + channel[:, None]
        if length <= SPLIT:
            weight = with_sink(top, total, bias)
            tl.store(out + target, (acc * weight[None, :]).to(out.dtype.element_ty), mask=present)
        else:
            tl.store(part + at[None, :] * CHANNELS + channel[:, None], acc, mask=present)
            tl.store(tops + at, top, mask=head < heads)
            tl.store(totals + at, total, mask=head < heads)


@dataclass(frozen=True)
class Config:
    """How a call is cut. split: columns per program; block: per tile; heads: per program."""

    swapped: bool
    split: int
    block: int
    heads: int
    warps: int
    stages: int


def config(heads: int, channels: int, split: int) -> Config:
    """By the model's shape alone, so that a query's bits do not depend on the batch."""
    wide = channels > 128
    # One stage: rows copied ahead pass through shared memory once more than rows loaded when they are used.
    if heads >= 48:
        return Config(False, split, 64 if wide else 32, 64, 8 if wide else 4, 1)
    return Config(True, split, 64, max(16, triton.next_power_of_2(heads)), 8 if wide else 4, 1)


def sparse_attention(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    dtype: torch.dtype,
    split: int,
    cos_sin: Tensor | None = None,
    plan: Config | None = None,
) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, checked there; q is float16. plan: for experiments."""
    tokens, heads, channels = q.shape
    plan = plan or config(heads, channels, split)
    splits = triton.cdiv(index.shape[1], plan.split)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    sums = tokens * splits * heads if splits > 1 else 1
    part = torch.empty(sums * channels, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, sums, dtype=torch.float32, device=q.device)
    kernel: Any = attend_swapped if plan.swapped else attend
    kernel[tokens, triton.cdiv(heads, plan.heads), splits](
        q,
        pool.bytes,
        pool.bytes.view(torch.bfloat16),
        index,
        lengths,
        sink,
        out,
        part,
        tops,
        totals,
        q.stride(0),
        q.stride(1),
        index.stride(0),
        heads,
        splits,
        scale * LOG2E,
        plan.split,
        plan.block,
        plan.heads,
        sizes(pool.layout),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if splits > 1 or cos_sin is not None:
        width = triton.next_power_of_2(channels)
        table, rope, lanes = turns(cos_sin, lengths)
        held = plan.split, channels, width, rope, lanes
        merge[tokens, heads](out, part, tops, totals, lengths, sink, table, heads, splits, *held)
    return out


# Strides that launches find to be multiples of 16.
_MULTIPLES = ("q_token", "q_head", "index_token", "heads")


def aot() -> list[AotCase]:
    """V4-Flash (64 heads), a quarter of it (16, tensor parallel), and V4.1's rows."""
    results = "out:*bf16 part:*fp32 tops:*fp32 totals:*fp32"
    tensors = f"q:*fp16 pool:*u8 plain:*bf16 index:*i32 lengths:*i32 sink:*fp32 {results}"
    numbers = "q_token:i32 q_head:i32 index_token:i32 heads:i32 splits:i32 scale:fp32"
    signature = dict(item.split(":") for item in f"{tensors} {numbers}".split())
    cases = []
    for label, heads, layout in (
        ("64 heads", 64, kv_fp8(64, 448, 64)),
        ("16 heads", 16, kv_fp8(64, 448, 64)),
        ("64 heads, 528-byte rows", 64, kv_fp8_v41(64)),
    ):
        plan = config(heads, 512, 2048)
        constants = {"SPLIT": plan.split, "BLOCK": plan.block, "HEADS": plan.heads, "LAYOUT": sizes(layout)}
        product = {"sm90": ("wgmma|HGMMA",), "sm100": (r"tcgen05\.mma",)}
        cases.append(
            AotCase(
                f"sparse attention, {label}",
                attend_swapped if plan.swapped else attend,
                {**signature, **dict.fromkeys(constants, "constexpr")},
                constants,
                plan.warps,
                plan.stages,
                expect=product,
                # Descriptors of the products, and numbers that no tile changes: spilled before the loop.
                spills=480,
                aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), *_MULTIPLES),
            )
        )
    return [*cases, _merge_case(signature)]


def _merge_case(attending: dict[str, str]) -> AotCase:
    """Of 512 channels, with the rotation back; Blackwell's own kernel uses it too."""
    names = ("out", "part", "tops", "totals", "lengths", "sink", "cos_sin", "heads", "splits")
    signature = {name: attending.get(name, "*fp32") for name in names}
    constants = {"SPLIT": 2048, "CHANNELS": 512, "WIDTH": 512, "ROPE": 64, "LANES": 64}
    signature |= dict.fromkeys(constants, "constexpr")
    return AotCase("sparse attention, merge and inverse RoPE", merge, signature, constants)
