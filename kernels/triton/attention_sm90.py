# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Sparse MLA attention on Hopper: launch and merge of `attention_sm90_kernel`, for V4's 584-byte rows.

A list is cut into items of 128 columns, whatever the batch. A block of 512 threads works through its items: two
groups of four warps fetch and dequantise 64 rows each (float16, exact), eight warps do the products and the
softmax of the 128 columns at once. So no sums are rescaled inside an item, and each warp group's logits have 64
keys: with 32, queries would be read from shared memory twice as often as keys.

Shared memory, of 232,448 bytes: queries 65,536, rows 131,072, weights 16,384, barriers and scratch under 1,024.
Registers, of 65,536: eight warps * 168 and eight * 88. Sums take 128 of the 168, so they cannot live beside the
logits of the next columns: a block overlaps fetching with products, not products with the softmax.

Items leave a mean in float16, a base and a total. A second kernel, started early (programmatic dependent launch),
merges those of a list first to last, five at a time. Lists of 128 columns and less are written at once. Where the
output is to be rotated back, the second kernel does that too, to lists of 128 columns and less in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged, check
from weft.kernels.gpu.interpreter import Traffic
from weft.kernels.layouts import is_v4, kv_fp8
from weft.kernels.triton.attention_parts import turn_in_place, turns
from weft.kernels.triton.common import rotate_back

LOG2E = 1.4426950408889634
DIM = 512
HEADS = 64
# Columns of an item.
SPLIT = 128
# Of a thread that fetches; less spills, more takes from the products.
FILL_REGISTERS = 88
MERGE_WARPS = 4
# Of the parts of one slab of queries: 400 of V4-Flash's, 112 of V4-Pro's.
PART_BYTES = 128 << 20
# Instructions that must be there: TMA, warp group products, direct conversion, 16-byte accesses, early launch.
EXPECT = (
    r"UTMALDG\.2D",
    r"HGMMA\.64x64x16\.F32",
    r"HGMMA\.64x128x16\.F32",
    r"F2FP\.\w+\.E4M3\.UNPACK_B",
    r"HMUL2",
    r"USETMAXREG",
    r"SYNCS\.PHASECHK",
    r"LDG\.E\.\w*\.?128",
    r"STG\.E\.128",
    r"griddepcontrol\.launch_dependents",
    # The 32 products of the logits without a wait between them: short of registers, the assembler serialises them.
    r"(?:HGMMA\.64x64x16(?:(?!DEPBAR|HGMMA)[\s\S])*){32}",
)


@triton.jit
def part_of(part, tops, totals, at, place, inside):
    """The mean, the base and the total of one item; nothing behind the last one."""
    value = tl.load(part + at * 512 + place, mask=inside & (place < 512), other=0.0)
    top = tl.load(tops + at, mask=inside, other=float("-inf"))
    return value.to(tl.float32), top, tl.load(totals + at, mask=inside, other=0.0)


@triton.jit
def weigh(acc, total, value, lift, sum):
    weight = sum * tl.exp2(lift)
    return tl.fma(value, tl.full([512], 0.0, tl.float32) + weight, acc), total + weight


@triton.jit
def channel_of(place):
    """Of a place in a part's memory, see `finish_part` there; neighbours of a pair are neighbours."""
    return place // 32 * 32 + place // 2 % 4 * 8 + place // 8 % 4 * 2 + place % 2


@triton.jit
def turned(value, cos_sin, token, ROPE: tl.constexpr):
    """[512] channels in a part's order, rotated back in float32."""
    pair = (channel_of(2 * tl.arange(0, 256)) - (512 - ROPE)) // 2
    turns = (pair >= 0) & (pair < ROPE // 2)
    at = cos_sin + token * ROPE + pair
    cos = tl.load(at, mask=turns, other=1.0)[None, :]
    sin = tl.load(at + ROPE // 2, mask=turns, other=0.0)[None, :]
    return tl.reshape(rotate_back(value.to(tl.float32)[None, :], cos, sin), [512])


@triton.jit(do_not_specialize=["heads", "splits"])
def merge(
    out, part, tops, totals, lengths, sink, cos_sin, heads, splits, SPLIT: tl.constexpr, ROPE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Grid (T, H): the mean of a list's parts, weighted by their totals, first to last, five at a time; rounded,
    then rotated back if ROPE > 0."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + token)
    bias = tl.load(sink + head) * 1.4426950408889634
    gdc_wait()
    if length > SPLIT:
        used = tl.cdiv(length, SPLIT)
        place = tl.arange(0, 512)
        highest = bias
        total = tl.where(bias == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([512], tl.float32)
        for begin in range(0, used, 5):
            at = (token * splits + begin) * heads + head
            v0, t0, s0 = part_of(part, tops, totals, at, place, begin < used)
            v1, t1, s1 = part_of(part, tops, totals, at + heads, place, begin + 1 < used)
            v2, t2, s2 = part_of(part, tops, totals, at + 2 * heads, place, begin + 2 < used)
            v3, t3, s3 = part_of(part, tops, totals, at + 3 * heads, place, begin + 3 < used)
            v4, t4, s4 = part_of(part, tops, totals, at + 4 * heads, place, begin + 4 < used)
            higher = tl.maximum(tl.maximum(highest, t0), tl.maximum(tl.maximum(t1, t2), tl.maximum(t3, t4)))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp2(highest - base)
            acc, total = weigh(acc * decay, total * decay, v0, t0 - base, s0)
            acc, total = weigh(acc, total, v1, t1 - base, s1)
            acc, total = weigh(acc, total, v2, t2 - base, s2)
            acc, total = weigh(acc, total, v3, t3 - base, s3)
            acc, total = weigh(acc, total, v4, t4 - base, s4)
            highest = higher
        share = tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))
        value = (acc * share).to(out.dtype.element_ty)
        if ROPE > 0:
            value = turned(value, cos_sin, token, ROPE).to(out.dtype.element_ty)
        tl.store(out + (token * heads + head) * 512 + channel_of(place), value)
    elif ROPE > 0:
        turn_in_place(out, cos_sin, token, head, heads, 512, ROPE, LANES)


@cache
def multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def chunk_of(items: int, splits: int, width: int) -> int:
    """Items in a row that a block takes at a time: they mostly share their queries. At most a whole list."""
    return min(splits, -(-items // width))


def sparse_attention(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    dtype: torch.dtype,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, checked there; q is float16 of 512 channels.

    Only where and when an item runs depends on the batch, never what is computed. Prefill goes through in slabs of
    queries, which bounds the parts' memory.
    """
    check(is_v4(pool.layout), pool.layout)
    tokens, heads, _ = q.shape
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    splits = max(1, -(-index.shape[1] // SPLIT))
    slab = max(1, PART_BYTES // (splits * heads * DIM * 2 * 16)) * 16 if splits > 1 else tokens
    sums = min(slab, tokens) * splits * heads if splits > 1 else 1
    part = torch.empty(sums * DIM, dtype=torch.float16, device=q.device)
    tops, totals = torch.empty(2, sums, dtype=torch.float32, device=q.device)
    for first in range(0, tokens, slab):
        these = slice(first, first + slab)
        turn = None if cos_sin is None else cos_sin[these]
        listed = pool, index[these], lengths[these]
        _launch(q[these], *listed, sink, scale, out[these], (part, tops, totals), splits, turn)
    return out


def _launch(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    out: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    splits: int,
    cos_sin: Tensor | None,
) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from weft.kernels.triton.attention_sm90_kernel import sparse

    tokens, heads, _ = q.shape
    layout = pool.layout
    items = tokens * -(-heads // HEADS) * splits
    width = multiprocessors(q.device.index)
    chunk = chunk_of(items, splits, width)
    box = TensorDescriptor.from_tensor(q.view(-1, DIM), [HEADS, DIM], NVMMASharedLayout(128, 16, rank=2))
    attend: Any = sparse
    attend[(min(-(-items // chunk), width),)](
        box,
        pool.bytes.view(torch.int32),
        pool.bytes.view(torch.int64),
        index,
        lengths,
        sink,
        out,
        *parts,
        index.stride(0),
        index.shape[1],
        heads,
        splits,
        items,
        chunk,
        scale * LOG2E,
        layout.page,
        layout.page_bytes,
        FILL_REGISTERS,
        num_warps=8,
    )
    if splits > 1 or cos_sin is not None:
        add: Any = merge
        table, *rope = turns(cos_sin, lengths)
        add[tokens, heads](
            out, *parts, lengths, sink, table, heads, splits, SPLIT, *rope, num_warps=MERGE_WARPS, launch_pdl=True
        )


def moved(lengths: Sequence[int], heads: int, chunk: int = 1, rope: int = 0) -> Traffic:
    """Bytes that the kernels' own loads and stores move, from their loops. chunk: items of a list that one block
    takes in turn, with one fetch of its queries; queries come in boxes of 64 heads. rope: channels of a bfloat16
    output that are rotated back."""
    blocks, loaded, stored = -(-heads // HEADS), 0, 0
    row = kv_fp8(64, 448, 64).row_bytes + 4
    for length in lengths:
        splits = max(1, -(-length // SPLIT))
        loaded += blocks * (-(-splits // chunk) * HEADS * DIM * 2 + length * row + 4 * splits) + 4 * heads
        stored += heads * DIM * 2
        if splits > 1:
            part = splits * heads * (2 * DIM + 8)
            loaded, stored = loaded + part, stored + part
        elif rope:
            loaded, stored = loaded + heads * rope * 2, stored + heads * rope * 2
        loaded += heads * rope * 4
    return Traffic(loaded, stored)


def aot() -> tuple[AotCase, ...]:
    """The number of heads is an argument: one kernel for V4-Flash, V4-Pro and shares of them."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from weft.kernels.triton.attention_sm90_kernel import sparse

    sums = "out:*bf16 part:*fp16 tops:*fp32 totals:*fp32"
    tensors = f"pool:*i32 words:*i64 index:*i32 lengths:*i32 sink:*fp32 {sums}"
    numbers = "index_token:i32 columns:i32 heads:i32 splits:i32 items:i32 chunk:i32 scale:fp32"
    signature = {"q": f"tensordesc<fp16[{HEADS},{DIM}],{NVMMASharedLayout(128, 16, rank=2)!r}>"}
    signature |= dict(item.split(":") for item in f"{tensors} {numbers}".split())
    aligned = (*(name for name, kind in signature.items() if kind.startswith("*")), "index_token")
    layout = kv_fp8(64, 448, 64)
    constants = {"PAGE": layout.page, "PAGE_BYTES": layout.page_bytes, "FILL_REGISTERS": FILL_REGISTERS}
    signature |= dict.fromkeys(constants, "constexpr")
    # What is spilled are the loops' own numbers, once an item.
    expect: dict[str, tuple[str, ...]] = {"sm90": EXPECT}
    attend = AotCase(
        "sparse attention, sm_90", sparse, signature, constants, 8, 1, ("sm90",), expect, 160, aligned
    )
    return attend, _merge_case("", 0), _merge_case(" and inverse RoPE", 64)


def _merge_case(more: str, rope: int) -> AotCase:
    tensors = "out:*bf16 part:*fp16 tops:*fp32 totals:*fp32 lengths:*i32 sink:*fp32"
    table = "*fp32" if rope else "*i32"
    signature = dict(item.split(":") for item in f"{tensors} cos_sin:{table} heads:i32 splits:i32".split())
    constants = {"SPLIT": SPLIT, "ROPE": rope, "LANES": max(2, rope)}
    signature |= dict.fromkeys(constants, "constexpr")
    expect: dict[str, tuple[str, ...]] = {"sm90": (r"griddepcontrol\.wait", r"LDG\.E\.64")}
    name = f"sparse attention, sm_90, merge{more}"
    return AotCase(name, merge, signature, constants, MERGE_WARPS, 1, ("sm90",), expect)
