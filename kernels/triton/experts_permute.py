"""Pairs of token and expert sorted by expert, and cut into tiles, in one launch without atomics.

A program per expert counts the pairs of lower experts, and its own: that is where its pairs begin, and its tiles
too, as ceil(pairs / tile) summed over the lower experts is at most (pairs of lower experts) / tile + their number.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase

_BLOCK = 2048


@triton.jit(do_not_specialize=("P",))
def sort_kernel(ids, order, table, P, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Program: expert. ids: [P]; order: [P]; table: [P / TILE + experts, 3]."""
    expert = tl.program_id(0)
    q = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        named = tl.load(ids + start + q, mask=start + q < P, other=0x7FFFFFFF)
        lower += (named < expert).to(tl.int32)
        own += (named == expert).to(tl.int32)
    begin, count = tl.sum(lower, 0), tl.sum(own, 0)
    place = begin
    for start in range(0, P, BLOCK):
        named = tl.load(ids + start + q, mask=start + q < P, other=0x7FFFFFFF)
        own = (named == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(own, 0) - 1, start + q, mask=own > 0)
        place += tl.sum(own, 0)
    at = begin // TILE + expert
    end = (begin + count) // TILE + expert + 1  # where the next expert's tiles begin
    for first in range(at, end, TILES):
        tile = first + tl.arange(0, TILES)
        done = (tile - at) * TILE
        rows = tl.minimum(tl.maximum(count - done, 0), TILE)
        entry = table + tile * 3
        tl.store(entry, expert + tl.zeros_like(tile), mask=tile < end)
        tl.store(entry + 1, begin + done, mask=tile < end)
        tl.store(entry + 2, rows, mask=tile < end)


def expert_tiles(ids: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.gpu.experts.expert_tiles`."""
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    table = torch.empty(pairs // tile + count, 3, dtype=torch.int32, device=ids.device)
    sort_kernel[(count,)](ids, order, table, pairs, TILE=tile, BLOCK=_BLOCK, TILES=32, num_warps=4)
    return order, table


def aot() -> tuple[AotCase, ...]:
    pointers = dict.fromkeys(("ids", "order", "table"), "*i32")
    constants = {"TILE": 64, "BLOCK": _BLOCK, "TILES": 32}
    signature = pointers | {"P": "i32"} | dict.fromkeys(constants, "constexpr")
    return (AotCase("expert_tiles", sort_kernel, signature, constants),)
