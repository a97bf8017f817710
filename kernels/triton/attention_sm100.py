"""Sparse MLA decode on Blackwell: launch, budgets and byte counts of `attention_sm100_kernel`.

Not run on a GPU yet: no Blackwell was at hand. It is compiled for sm_100a, and tests run its source on the CPU,
with its partitions, copies and products in random order. Formats: V4's 584-byte rows (448 e4m3 codes in groups of
64, 64 bfloat16 channels), any number of heads.

One thread block takes one query, 64 of its heads and one split of its columns, 64 columns a tile. A tile's rows
come by TMA gather4 (the pool is an array of 576-byte rows, so a row number is a coordinate; its 8 bytes of scales
come by an 8-byte asynchronous copy) and land in the second half of the memory that their dequantised tile fills.

Products, both of tcgen05.mma with float32 sums in tensor memory:
- logits [64 heads, 64 keys]: a thread pair owns a head, so the softmax stays within a warp;
- sums, channels as rows: 4 x [128 channels, 64 heads]. Heads as rows would be a 64-row product at half rate, and
  512 columns of tensor memory for the sums alone.
128 heads are two blocks of 64, side by side in the grid: their sums together would be all of tensor memory. The
second block's rows come from the L2 cache.

Tensor memory, of 512 columns: sums 4 * 64 = 256, logits 2 tiles * 64 = 128; allocated 512 (a power of two).
Shared memory, of 232,448 bytes: queries 65,536; two tiles 2 * 65,536; weights 8,192; scales 1,024; factors,
barriers and scratch under 1,024: one block a multiprocessor. Raw rows beside the tiles, 36,864, would not fit.
Registers, 65,536: softmax 4 warps * 192, dequantise 8 * 96, multiply and fetch 4 * 128 (a warp group's share).

Time of a tile on paper, in cycles of one multiprocessor; the largest bounds a pipeline that overlaps all of them:
- rows from memory, 8 TB/s over 148 multiprocessors at 1.85 GHz, 29 bytes a cycle: 64 * 584 / 29 = 1,290;
- products: logits 32 steps of 32 at half rate = 1,024; sums 16 steps of 48 (A and B from shared memory) = 768;
- dequantise, two instructions a pair (a direct conversion, a packed product): about 300 a thread on 8 warps = 600;
- shared memory at 128 bytes a cycle: products 224 KB, gather 36, dequantise 84, weights 8: 352 KB = 2,820.
Shared memory bounds it: 44 cycles a row, 2.2 times the memory's share. In the one-source kernel the same steps run
one after the other in the same warps: no product runs while they dequantise, and the sums live in their registers.

Deterministic: splits are at multiples of `split` columns of the row's own list, tiles left to right, and whether a
head's sums are rescaled is the head's own decision. -1 reads row 0, the null row, which no one writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import GLUON, Paged, check, installed
from weft.kernels.gpu.interpreter import Traffic
from weft.kernels.layouts import is_v4, kv_fp8

LOG2E = 1.4426950408889634
DIM = 512
HEADS = 64
KEYS = 64
DATA = 576
# Columns of one thread block: the window and 1,024 entries fit unsplit; an unsplit list moves least.
SPLIT = 2560

EXPECT = (
    r"cp\.async\.bulk\.tensor\.2d\.tile::gather4",
    r"cp\.async\.mbarrier\.arrive\.noinc",
    r"mbarrier\.arrive\.expect_tx",
    r"mbarrier\.try_wait",
    r"tcgen05\.alloc",
    r"tcgen05\.mma\.cta_group::1\.kind::f16",
    r"tcgen05\.commit",
    r"tcgen05\.ld",
    r"tcgen05\.st",
    r"setmaxnreg\.inc",
    r"setmaxnreg\.dec",
    r"fence\.proxy\.async",
    r"UTMALDG\.2D\.GATHER4",
    r"UTCHMMA",
    r"F2FP\.\w+\.E4M3\.UNPACK_B",
    r"HMUL2",
)


def available() -> bool:
    """Whether the installed Triton has the Gluon that the kernel is written in."""
    return GLUON in installed()


def sparse_decode_sm100(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    split: int = SPLIT,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, checked there.

    q: [T, H, 512]; float16 and bfloat16 are the products' type, float32 is rounded to float16 first (in float16, q
    and rows must stay below 65,504). index: [T, N], a stride of its own; sink: [H], in the denominator only.
    """
    check(is_v4(pool.layout), pool.layout)
    from weft.kernels.triton.attention_parts import merge, turns
    from weft.kernels.triton.attention_sm100_kernel import attend

    tokens, heads, dim = q.shape
    dtype = dtype or q.dtype
    if q.dtype == torch.float32:
        q = q.to(torch.float16)
    splits = max(1, -(-index.shape[1] // split))
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    several = splits > 1
    part = q.new_empty(tokens * splits * heads * dim if several else 1, dtype=torch.float32)
    tops, totals = q.new_empty(2, tokens * splits * heads if several else 1, dtype=torch.float32)
    layout = pool.layout
    kernel: Any = attend
    kernel[tokens * -(-heads // HEADS), splits](
        *_descriptors(q, pool),
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
        scale * LOG2E,
        split,
        layout.page,
        layout.page_bytes // DATA,
        num_warps=4,
    )
    if several or cos_sin is not None:
        add: Any = merge
        table, rope, lanes = turns(cos_sin, lengths)
        grid = tokens, heads
        add[grid](out, part, tops, totals, lengths, sink, table, heads, splits, split, DIM, DIM, rope, lanes)
    return out


def _descriptors(q: Tensor, pool: Paged) -> tuple[Any, ...]:
    """The queries, then the pool by 576-byte rows: 128 codes, 64 codes, 64 bfloat16 channels."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows = pool.bytes.view(-1, DATA)
    views = (q.contiguous().view(-1, DIM), rows, rows, rows.view(torch.bfloat16))
    return tuple(
        TensorDescriptor.from_tensor(x, list(block), NVMMASharedLayout(line, bits, rank=2))
        for x, (block, bits, line) in zip(views, BOXES, strict=True)
    )


# Of q, codes, tail, plain: a transfer's box, bits of an element, bytes of a line in shared memory.
BOXES = (((HEADS, DIM), 16, 128), ((1, 128), 8, 128), ((1, 64), 8, 64), ((1, 64), 16, 128))


def aot() -> tuple[AotCase, ...]:
    """The number of heads is an argument: one kernel for V4-Flash and V4-Pro. Pages of 64 and 256 rows."""
    if not available():
        return ()
    return _case("float16", "fp16", 64), _case("bfloat16", "bf16", 64), _case("pages of 256", "fp16", 256)


def _case(label: str, dtype: str, page: int) -> AotCase:
    from triton.experimental.gluon.language import NVMMASharedLayout

    from weft.kernels.triton.attention_sm100_kernel import attend

    types = dict(zip(("q", "codes", "tail", "plain"), (dtype, "u8", "u8", "bf16"), strict=True))
    signature = {
        name: f"tensordesc<{kind}[{','.join(map(str, block))}],{NVMMASharedLayout(line, bits, rank=2)!r}>"
        for (name, kind), (block, bits, line) in zip(types.items(), BOXES, strict=True)
    }
    tensors = "words:*i64 index:*i32 lengths:*i32 sink:*fp32 out:*bf16 parts:*fp32 tops:*fp32 totals:*fp32"
    numbers = "index_token:i32 heads:i32 splits:i32 scale:fp32"
    signature |= dict(item.split(":") for item in f"{tensors} {numbers}".split())
    layout = kv_fp8(page, 448, 64)
    constants = {"SPLIT": SPLIT, "PAGE": page, "PAGE_ROWS": layout.page_bytes // DATA}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"sparse attention, sm_100, {label}"
    return AotCase(name, attend, signature, constants, 4, 1, ("sm100",), {"sm100": EXPECT})


def moved(lengths: Sequence[int], heads: int, split: int = SPLIT, itemsize: int = 2, rope: int = 0) -> Traffic:
    """Bytes that the kernels' own loads and stores move, from their loops; every listed row counts as a row. rope:
    channels of the output that are rotated back.

    Boxes count whole: 64 heads of queries even where there are fewer, 64 rows even in a last tile of one.
    """
    blocks, out = -(-heads // HEADS), heads * DIM * itemsize
    loaded = stored = 0
    for length in lengths:
        splits = max(1, -(-length // split))
        tiles = sum(-(-min(split, length - begin) // KEYS) for begin in range(0, length, split))
        queries = splits if length else 0
        numbers = 3 * 4 * length  # twice by `fetch`, once by `soften`
        loaded += blocks * (
            queries * HEADS * DIM * itemsize + tiles * KEYS * DATA + 8 * length + numbers + 4 * splits
        )
        stored += out
        loaded += heads * rope * 4
        if splits == 1:
            loaded, stored = loaded + heads * (4 + rope * itemsize), stored + heads * rope * itemsize
        else:  # partial sums, base and total, written once and read once (the base twice) by the merge
            stored += splits * heads * 4 * (DIM + 2)
            loaded += splits * heads * 4 * (DIM + 3) + heads * 4 * 2
    return Traffic(loaded, stored)
