"""Scores before they are drawn from: penalties, biases and bans of single tokens; masks; and counting matches."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: SIM102 -- one condition of a compiled kernel and one of its data are two ifs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.sampling import BLOCK, Edits, Masks, Scores
from weft.kernels.triton.sampling_parts import is_allowed, row_mask

_WARPS = 8
_CHUNK = 256


@triton.jit(do_not_specialize=("width", "blocks"))
def adjust_kernel(
    copies, logits, stride, rows, starts, tokens, values, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """One program: one block of one row that has edits, copied and changed. `left` counts the blocks in which
    something finite is left, or which no mask asks."""
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = tl.load(rows + slot)
    source = logits + row.to(tl.int64) * stride
    copies += slot.to(tl.int64) * (blocks * BLOCK)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    tl.store(copies + column, tl.load(source + column, mask=valid, other=float("-inf")), mask=valid)
    tl.debug_barrier()
    place = slot * (blocks + 1) + block
    last = tl.load(starts + place + 1)
    for first in range(tl.load(starts + place), last, CHUNK):
        at = first + tl.arange(0, CHUNK)
        token = tl.load(tokens + at, mask=at < last, other=0)
        x = tl.load(source + token, mask=at < last, other=0.0)
        factor = tl.load(values + at * 3, mask=at < last, other=1.0)
        bias = tl.load(values + at * 3 + 2, mask=at < last, other=0.0)
        x = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
        x -= tl.load(values + at * 3 + 1, mask=at < last, other=0.0)
        x = tl.where(bias == float("-inf"), float("-inf"), x + bias)
        tl.store(copies + token, x, mask=at < last)
    tl.debug_barrier()
    found = 1
    if MASKS:
        if held >= 0:
            x = tl.load(copies + column, mask=valid, other=float("-inf"))
            finite = valid & (tl.abs(x) < float("inf")) & is_allowed(words, held, column, valid)
            found = tl.max(finite.to(tl.int32))
    tl.atomic_add(left + slot, found, sem="relaxed")


@triton.jit(do_not_specialize=("width", "blocks"))
def mask_kernel(logits, stride, words, mask_slots, width, blocks, BLOCK: tl.constexpr):
    """One program: one block of one row."""
    row = tl.program_id(0) // blocks
    words, held = row_mask(words, mask_slots, row, width, True)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    banned = valid & (is_allowed(words, held, column, valid) == 0)
    tl.store(logits + row.to(tl.int64) * stride + column, float("-inf"), mask=banned)


@triton.jit
def match_kernel(kept, drawn, drafts, starts, WIDTH: tl.constexpr):
    """One program: one chain."""
    chain = tl.program_id(0)
    first, last = tl.load(starts + chain), tl.load(starts + chain + 1)
    count = last - first
    for begin in range(first, last, WIDTH):
        at = begin + tl.arange(0, WIDTH)
        token = tl.load(drawn + at, mask=at < last, other=0)
        wrong = (at < last) & (token != tl.load(drafts + at, mask=at < last, other=0))
        count = tl.minimum(count, tl.min(tl.where(wrong, at - first, last - first)))
    tl.store(kept + chain, count)


def adjust(scores: Scores, edits: Edits) -> Tensor:
    """[e, a multiple of BLOCK from V on] float32 copies of the rows that have edits."""
    logits, masks = scores.logits, scores.masks
    width = logits.shape[1]
    blocks = triton.cdiv(width, BLOCK)
    count = len(edits.rows)
    copies = torch.empty(count, blocks * BLOCK, dtype=torch.float32, device=logits.device)
    held = masks is not None and len(masks.words) > 0
    words, slots = (masks.words, masks.slots) if masks is not None and held else (edits.left, edits.left)
    # Fused multiply-adds would round once where the sampler of the host rounds twice.
    adjust_kernel[(count * blocks,)](
        copies, logits, logits.stride(0), edits.rows, edits.starts, edits.tokens, edits.values, edits.left, words,
        slots, width, blocks, BLOCK=BLOCK, CHUNK=_CHUNK, MASKS=held, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return copies


def apply_bitmask(logits: Tensor, masks: Masks) -> None:
    """As the wrapper of this name."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    given = (logits, logits.stride(0), masks.words, masks.slots, width, blocks)
    mask_kernel[(rows * blocks,)](*given, BLOCK=BLOCK, num_warps=_WARPS)


def draft_matches(drawn: Tensor, drafts: Tensor, starts: Tensor) -> Tensor:
    """As the wrapper of this name."""
    kept = torch.empty(len(starts) - 1, dtype=torch.int32, device=drawn.device)
    match_kernel[(len(kept),)](kept, drawn, drafts, starts, WIDTH=32, num_warps=1)
    return kept


def adjust_cases() -> tuple[tuple[Any, ...], ...]:
    """What to compile, as `weft.kernels.triton.sampling` lists it: name, kernel, constants, warps, expected
    instructions, options."""
    sizes = {"BLOCK": BLOCK, "CHUNK": _CHUNK, "MASKS": True}
    fused = {"enable_fp_fusion": False}
    return (
        ("penalties, biases and bans", adjust_kernel, sizes, _WARPS, None, fused),
        ("masks", mask_kernel, {"BLOCK": BLOCK}, _WARPS),
        ("matches", match_kernel, {"WIDTH": 32}, 1),
    )
