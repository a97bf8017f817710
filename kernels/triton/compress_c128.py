"""c128a: groups folded token by token, normalised, rotated, quantised and stored, and open groups, in one launch.

A program folds two groups side by side, by their place in the group, so that both take the same row of ape.
Programs 0..S-1 have a sequence each: its first group, if it was begun in an earlier step, and the group that is
open behind it. The others have two of the remaining entries each, whose tokens are all in the step; they never
touch the state, so nothing races. Both kinds fold in the same code, without contracted multiply-adds: by the
formula, and under the interpreter to the bits, of `weft.kernels.compress.fold_c128`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import RowLayout, kv_fp8
from weft.kernels.triton.common import layout_constants, load_rotation, rms_scale, rotate, store_rows

if TYPE_CHECKING:
    from weft.kernels.gpu.compress import C128Plan

# The order of a norm's sum follows from it.
_WARPS = 8
# Tokens of a prefill whose loads are in flight together.
_UNROLL = 8


@triton.jit
def _begun_group(program, start, count, entries, number):
    """Of a sequence, the group that an earlier step began: the position its places count from, the places of its
    tokens from..to (none if there is no such group), and the entry that it is, -1: none."""
    begin = tl.load(start + program)
    group = begin // 128
    low = begin % 128
    high = tl.where(low > 0, tl.minimum(low + tl.load(count + program), 128), low)
    first = tl.load(entries + program)
    listed = (high == 128) & (first < tl.load(entries + program + 1))
    listed = listed & (tl.load(number + first, mask=listed, other=-1) == group)
    return group * 128, low, high, tl.where(listed, first, -1)


@triton.jit
def _opened_group(program, start, count):
    """Of a sequence, the group that begins in this step and stays open."""
    begin = tl.load(start + program)
    end = begin + tl.load(count + program)
    base = end // 128 * 128
    return base, begin * 0, tl.where(base >= begin, end - base, 0), begin * 0 - 1


@triton.jit
def _whole_group(index, start, sequence, number, total):
    """Of an entry whose group begins in the step, and whose it is."""
    owner = tl.load(sequence + index, mask=index < total, other=-1)
    base = 128 * tl.load(number + index, mask=index < total, other=0)
    whole = (owner >= 0) & (base >= tl.load(start + owner, mask=owner >= 0, other=0))
    return tl.where(whole, owner, 0), base, index * 0, tl.where(whole, 128, 0), tl.where(whole, index, -1)


@triton.jit
def _load_token(rows, row, place, low, high, stride, D: tl.constexpr, COLS: tl.constexpr):
    """Value and score [1, C] of a group's token at `place`, if low <= place < high. row: int64, which row of the
    step place 0 is, or would be."""
    column = tl.arange(0, COLS)[None, :]
    mask = column < tl.where((place >= low) & (place < high), D, 0)
    at = rows + (row + place) * stride + column
    return tl.load(at, mask=mask, other=0.0), tl.load(at + D, mask=mask, other=0.0)


@triton.jit
def _load_block(
    rows, ape, row_a, row_b, first, low_a, high_a, low_b, high_b, stride,
    D: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """ape, and value and score of both groups, of UNROLL places from `first`."""
    column = tl.arange(0, COLS)[None, :]
    tokens = ()
    for step in tl.static_range(UNROLL):
        place = first + step
        used = ((place >= low_a) & (place < high_a)) | ((place >= low_b) & (place < high_b))
        bias = tl.load(ape + place * D + column, mask=column < tl.where(used, D, 0), other=0.0)
        value_a, score_a = _load_token(rows, row_a, place, low_a, high_a, stride, D, COLS)
        value_b, score_b = _load_token(rows, row_b, place, low_b, high_b, stride, D, COLS)
        tokens = tokens + ((bias, value_a, score_a, value_b, score_b),)  # type: ignore[assignment]  # noqa: RUF005
    return tokens


@triton.jit
def _fold_token(
    top, total, weighted, value, score, behind, row, place, low, high,
    D: tl.constexpr, COLS: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """The state [1, C] of a group behind that token; as it was, where there is none."""
    column = tl.arange(0, COLS)[None, :]
    mask = column < tl.where((place >= low) & (place < high), D, 0)
    higher = tl.maximum(top, score)
    decay = tl.exp(top - higher)
    weight = tl.exp(score - higher)
    top = tl.where(mask, higher, top)
    total = tl.where(mask, total * decay + weight, total)
    weighted = tl.where(mask, weighted * decay + value * weight, weighted)
    if BEHIND:
        _store_state(behind + (row + place) * (3 * D) + column, top, total, weighted, mask, D)
    return top, total, weighted


@triton.jit
def _load_state(at, low, high, D: tl.constexpr, COLS: tl.constexpr):
    """Of a group that goes on; of one that begins, the state of a group without tokens."""
    mask = tl.arange(0, COLS)[None, :] < tl.where((low > 0) & (low < high), D, 0)
    top = tl.load(at, mask=mask, other=float("-inf"))
    return top, tl.load(at + D, mask=mask, other=0.0), tl.load(at + 2 * D, mask=mask, other=0.0)


@triton.jit
def _store_state(at, top, total, weighted, mask, D: tl.constexpr):
    tl.store(at, top, mask=mask)
    tl.store(at + D, total, mask=mask)
    tl.store(at + 2 * D, weighted, mask=mask)


@triton.jit
def _finish(
    state, top, total, weighted, low, high, entry, norm, cos_sin, target, pool, eps,
    D: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Write the state of a group that stays open, store the entry of one that is complete."""
    column = tl.arange(0, COLS)[None, :]
    _store_state(state, top, total, weighted, column < tl.where((low < high) & (high < 128), D, 0), D)
    if entry >= 0:
        x = tl.where(column < D, tl.div_rn(weighted, total), 0.0)
        weight = tl.load(norm + column, mask=column < D, other=0.0)
        lane = tl.zeros([1], tl.int32)
        cos, sin = load_rotation(cos_sin, lane + entry, lane == 0, D, ROPE, COLS)
        x = rotate(x * rms_scale(x, eps, D) * weight, cos, sin)
        row = tl.load(target + entry + tl.arange(0, 1))
        store_rows(x, row, pool, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST)


@triton.jit
def _compress_c128(
    rows, ape, fold, norm, cos_sin, start, count, offset, slot, entries, sequence, number, target,
    pool, behind, stride, eps, sequences, total_entries,
    D: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, BEHIND: tl.constexpr, UNROLL: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < sequences:
        owner_a = program
        owner_b = program
        base_a, low_a, high_a, entry_a = _begun_group(program, start, count, entries, number)
        base_b, low_b, high_b, entry_b = _opened_group(program, start, count)
    else:
        index = (program - sequences) * 2
        owner_a, base_a, low_a, high_a, entry_a = _whole_group(index, start, sequence, number, total_entries)
        owner_b, base_b, low_b, high_b, entry_b = _whole_group(index + 1, start, sequence, number, total_entries)
    row_a = (tl.load(offset + owner_a) + (base_a - tl.load(start + owner_a))).to(tl.int64)
    row_b = (tl.load(offset + owner_b) + (base_b - tl.load(start + owner_b))).to(tl.int64)
    column = tl.arange(0, COLS)[None, :]
    state_a = fold + tl.load(slot + owner_a).to(tl.int64) * (3 * D) + column
    state_b = fold + tl.load(slot + owner_b).to(tl.int64) * (3 * D) + column
    top_a, total_a, weighted_a = _load_state(state_a, low_a, high_a, D, COLS)
    top_b, total_b, weighted_b = _load_state(state_b, low_b, high_b, D, COLS)
    first = tl.minimum(tl.where(low_a < high_a, low_a, 128), tl.where(low_b < high_b, low_b, 128))
    last = tl.maximum(tl.where(low_a < high_a, high_a, 0), tl.where(low_b < high_b, high_b, 0))
    tokens = _load_block(rows, ape, row_a, row_b, first, low_a, high_a, low_b, high_b, stride, D, COLS, UNROLL)
    for block in range(first, last, UNROLL):
        coming = _load_block(
            rows, ape, row_a, row_b, block + UNROLL, low_a, high_a, low_b, high_b, stride, D, COLS, UNROLL
        )
        # The assembler moves no load behind it: the next tokens are on their way while these are folded.
        tl.debug_barrier()
        for step in tl.static_range(UNROLL):
            bias, value_a, score_a, value_b, score_b = tokens[step]
            place = block + step
            top_a, total_a, weighted_a = _fold_token(
                top_a, total_a, weighted_a, value_a, score_a + bias, behind, row_a, place, low_a, high_a,
                D, COLS, BEHIND,
            )  # fmt: skip
            top_b, total_b, weighted_b = _fold_token(
                top_b, total_b, weighted_b, value_b, score_b + bias, behind, row_b, place, low_b, high_b,
                D, COLS, BEHIND,
            )  # fmt: skip
        tokens = coming
    tl.debug_barrier()  # every thread has read the state
    _finish(
        state_a, top_a, total_a, weighted_a, low_a, high_a, entry_a, norm, cos_sin, target, pool, eps,
        D, COLS, ROPE, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST,
    )  # fmt: skip
    _finish(
        state_b, top_b, total_b, weighted_b, low_b, high_b, entry_b, norm, cos_sin, target, pool, eps,
        D, COLS, ROPE, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST,
    )  # fmt: skip


def compress_c128(
    rows: Tensor,
    ape: Tensor,
    fold: Tensor,
    norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C128Plan,
    pool: Paged,
    eps: float,
    *,
    behind: Tensor | None = None,
) -> None:
    """See `weft.kernels.gpu.compress.compress_c128`."""
    sequences, total = plan.start.numel(), plan.sequence.numel()
    sizes = _constants(norm.numel(), cos_sin_entries.shape[1], behind is not None, pool.layout)
    sizes["UNROLL"] = 1 if rows.shape[0] <= sequences else _UNROLL
    _compress_c128[(sequences + triton.cdiv(total, 2),)](
        rows, ape, fold, norm, cos_sin_entries, plan.start, plan.count, plan.offset, plan.slot, plan.entries,
        plan.sequence, plan.number, plan.target, pool.bytes, fold if behind is None else behind,
        rows.stride(0), eps, sequences, total, **sizes, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _constants(dim: int, rope: int, behind: bool, pool: RowLayout) -> dict[str, Any]:
    columns = triton.next_power_of_2(dim)
    sizes = {"D": dim, "COLS": columns, "ROPE": rope, "BEHIND": behind, "UNROLL": _UNROLL}
    return sizes | layout_constants(pool)


def aot() -> tuple[AotCase, ...]:
    """The sizes that V4-Flash and V4-Pro share, with and without drafts."""
    signature = dict.fromkeys(("rows", "ape", "fold", "norm", "cos_sin"), "*fp32")
    plan = ("start", "count", "offset", "slot", "entries", "sequence", "number", "target")
    signature |= dict.fromkeys(plan, "*i32") | {"pool": "*u8", "behind": "*fp32", "stride": "i32", "eps": "fp32"}
    signature |= {"sequences": "i32", "total_entries": "i32"}
    aligned = ("stride", *(name for name, kind in signature.items() if kind.startswith("*")))
    cases = []
    for name, behind in (("compress_c128", False), ("compress_c128_drafts", True)):
        constants = _constants(512, 64, behind, kv_fp8(64, 448, 64))
        # Two channels a thread: eight warps have 512 of them.
        wide = (r"ld\.global\.v2", r"cvt\.rn\.satfinite\.e4m3x2")
        cases.append(
            AotCase(
                name,
                _compress_c128,
                signature | dict.fromkeys(constants, "constexpr"),
                constants,
                warps=_WARPS,
                expect={"sm90": wide, "sm100": wide},
                aligned=aligned,
                options={"enable_fp_fusion": False},
            )
        )
    return tuple(cases)
