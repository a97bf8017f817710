"""c4a: entries and index keys pooled, normalised, rotated, quantised and stored, and the tails, in one launch.

Programs 0..S-1 have a sequence each: they make the entries that pool rows of its tail, at most two, and then write
the tail. The others have a few of the remaining entries each; those read rows of the step only, so nothing races.
The second axis of the grid parts attention's channels from the indexer's. Every program makes its entries one by
one, in the same code, without contracted multiply-adds: an entry's bits do not depend on where it was made.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8, kv_fp8
from weft.kernels.triton.common import hadamard, layout_constants, load_rotation, rms_scale, rotate, store_rows

if TYPE_CHECKING:
    from weft.kernels.gpu.compress import C4Plan

# The order of a norm's sum follows from it.
_WARPS = 4


@triton.jit
def _entries_of(program, start, begin, many, first, last, sequence, number, sequences, total, MANY: tl.constexpr):
    """A program's entries: the first, the one behind the last, and a bit mask of the places in a group of four
    that it wants ape of. begin, many, first, last: of a sequence's program, its tokens and its entries."""
    if program < sequences:
        number_of_first = tl.load(number + first, mask=first < last, other=0)
        old = tl.where(begin > 0, (begin + 3) // 4 - number_of_first + 1, 0)
        last = tl.minimum(last, first + old)
        places = ((1 << tl.minimum(many, 4)) - 1) << (begin % 4)
        places = places | (places >> 4)
    else:
        first = (program - sequences) * MANY
        index = first + tl.arange(0, MANY)
        owner = tl.load(sequence + index, mask=index < total, other=-1)
        begin_of = tl.load(start + owner, mask=owner >= 0, other=0)
        position = 4 * tl.load(number + index, mask=owner >= 0, other=0) - 4
        mine = (owner >= 0) & (tl.maximum(position, 0) >= begin_of)
        last = tl.where(tl.max(mine.to(tl.int32), 0) > 0, tl.minimum(first + MANY, total), first)
        places = tl.full([], 15, tl.int32)
    return first, last, places


@triton.jit
def _bias(
    ape, places, wanted,
    SLOT: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ape [1, C] of place SLOT among the eight that an entry pools, if the program wants it."""
    column = tl.arange(0, COLS)[None, :]
    bound = tl.where(wanted & ((places >> (SLOT % 4)) & 1 > 0), D, 0)
    return tl.load(ape + (SLOT % 4) * HALF + FIRST + (SLOT // 4) * D + column, mask=column < bound, other=0.0)


@triton.jit
def _token(
    recent, kept, bias, position, begin, stride,
    SLOT: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Place SLOT of the eight: value and score [1, C], -inf where there is no row.

    recent: where the row of place 0 is, or would be, in the step; kept: the tail.
    """
    column = tl.arange(0, COLS)[None, :]
    position = position + SLOT
    new = position >= begin
    row = tl.where(new, recent + SLOT * stride, kept + (position % 8) * (2 * HALF))
    row += FIRST + (SLOT // 4) * D
    mask = column < tl.where(position >= 0, D, 0)
    value = tl.load(row + column, mask=mask, other=0.0)
    score = tl.load(row + HALF + column, mask=mask, other=0.0)
    score = tl.where(new, score + bias, score)
    return value, tl.where(position >= 0, score, float("-inf"))


@triton.jit
def _pool(
    recent, kept, b0, b1, b2, b3, b4, b5, b6, b7, position, begin, stride,
    FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """An entry [1, COLS] before its norm; sums in halves, as the CPU's."""
    v0, s0 = _token(recent, kept, b0, position, begin, stride, 0, FIRST, HALF, D, COLS)
    v1, s1 = _token(recent, kept, b1, position, begin, stride, 1, FIRST, HALF, D, COLS)
    v2, s2 = _token(recent, kept, b2, position, begin, stride, 2, FIRST, HALF, D, COLS)
    v3, s3 = _token(recent, kept, b3, position, begin, stride, 3, FIRST, HALF, D, COLS)
    v4, s4 = _token(recent, kept, b4, position, begin, stride, 4, FIRST, HALF, D, COLS)
    v5, s5 = _token(recent, kept, b5, position, begin, stride, 5, FIRST, HALF, D, COLS)
    v6, s6 = _token(recent, kept, b6, position, begin, stride, 6, FIRST, HALF, D, COLS)
    v7, s7 = _token(recent, kept, b7, position, begin, stride, 7, FIRST, HALF, D, COLS)
    low = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    top = tl.maximum(low, tl.maximum(tl.maximum(s4, s5), tl.maximum(s6, s7)))
    s0, s1, s2, s3 = tl.exp(s0 - top), tl.exp(s1 - top), tl.exp(s2 - top), tl.exp(s3 - top)
    s4, s5, s6, s7 = tl.exp(s4 - top), tl.exp(s5 - top), tl.exp(s6 - top), tl.exp(s7 - top)
    total = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
    even = (v0 * s0 + v4 * s4) + (v2 * s2 + v6 * s6)
    weighted = even + ((v1 * s1 + v5 * s5) + (v3 * s3 + v7 * s7))
    return tl.div_rn(weighted, total)


@triton.jit
def _finish(x, norm, cos_sin, index, eps, D: tl.constexpr, ROPE: tl.constexpr, COLS: tl.constexpr):
    """Norm and RoPE of an entry."""
    column = tl.arange(0, COLS)[None, :]
    weight = tl.load(norm + column, mask=column < D, other=0.0)
    lane = tl.zeros([1], tl.int32)
    cos, sin = load_rotation(cos_sin, lane + index, lane == 0, D, ROPE, COLS)
    return rotate(x * rms_scale(x, eps, D) * weight, cos, sin)


@triton.jit
def _keep(
    recent, kept, bias, begin, end, stride,
    SLOT: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write to a tail, of the step's last tokens at place SLOT % 4 of their groups, the half of the channels that
    SLOT stands for. recent: the row of position `begin`."""
    column = tl.arange(0, COLS)[None, :]
    newest = end - 4 + ((SLOT - end) & 3)
    for groups in tl.static_range(2):
        position = newest - 4 * groups
        mask = column < tl.where(position >= begin, D, 0)
        at = FIRST + (SLOT // 4) * D + column
        row = recent + (position - begin).to(tl.int64) * stride + at
        place = kept + (position % 8) * (2 * HALF) + at
        value = tl.load(row, mask=mask)
        score = tl.load(row + HALF, mask=mask)
        tl.store(place, value, mask=mask)
        tl.store(place + HALF, score + bias, mask=mask)


@triton.jit
def _part(
    rows, ape, tail, norm, cos_sin, start, offset, slot, sequence, number, target, pool, stride, eps,
    first, last, places, since, many, recent_row, own_slot, own,
    FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Make and store a program's entries, of the D channels that begin at FIRST; then write the tail of its
    sequence, if it has one: own."""
    wanted = own | (first < last)
    b0 = _bias(ape, places, wanted, 0, FIRST, HALF, D, COLS)
    b1 = _bias(ape, places, wanted, 1, FIRST, HALF, D, COLS)
    b2 = _bias(ape, places, wanted, 2, FIRST, HALF, D, COLS)
    b3 = _bias(ape, places, wanted, 3, FIRST, HALF, D, COLS)
    b4 = _bias(ape, places, wanted, 4, FIRST, HALF, D, COLS)
    b5 = _bias(ape, places, wanted, 5, FIRST, HALF, D, COLS)
    b6 = _bias(ape, places, wanted, 6, FIRST, HALF, D, COLS)
    b7 = _bias(ape, places, wanted, 7, FIRST, HALF, D, COLS)
    for index in range(first, last):
        owner = tl.load(sequence + index)
        if owner >= 0:
            begin = tl.load(start + owner)
            entry = tl.load(number + index)
            position = 4 * entry - 4
            if own | (tl.maximum(position, 0) >= begin):
                row = tl.load(offset + owner) + (position - begin)
                recent = rows + row.to(tl.int64) * stride
                kept = tail + tl.load(slot + owner).to(tl.int64) * (8 * 2 * HALF)
                x = _pool(
                    recent, kept, b0, b1, b2, b3, b4, b5, b6, b7, position, begin, stride, FIRST, HALF, D, COLS
                )
                x = _finish(x, norm, cos_sin, index, eps, D, ROPE, COLS)
                if HADAMARD:
                    x = hadamard(x)
                place = tl.load(target + index + tl.arange(0, 1))
                store_rows(
                    x, place, pool, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST
                )
    if many > 0:
        tl.debug_barrier()  # every thread has read the tail
        row_of_since = rows + recent_row * stride
        own_tail = tail + own_slot * (8 * 2 * HALF)
        end = since + many
        _keep(row_of_since, own_tail, b0, since, end, stride, 0, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b1, since, end, stride, 1, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b2, since, end, stride, 2, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b3, since, end, stride, 3, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b4, since, end, stride, 4, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b5, since, end, stride, 5, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b6, since, end, stride, 6, FIRST, HALF, D, COLS)
        _keep(row_of_since, own_tail, b7, since, end, stride, 7, FIRST, HALF, D, COLS)


@triton.jit
def _compress_c4(
    rows, ape, tail, norm, key_norm, cos_sin, start, count, offset, slot, entries, sequence, number,
    target, key_target, pool, keys, stride, eps, sequences, total,
    D: tl.constexpr, KEY_D: tl.constexpr, COLS: tl.constexpr, KEY_COLS: tl.constexpr,
    ROPE: tl.constexpr, HADAMARD: tl.constexpr, MANY: tl.constexpr,
    PAGE: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
    KEY_PAGE: tl.constexpr, KEY_CODED: tl.constexpr, KEY_PLAIN: tl.constexpr, KEY_GROUP: tl.constexpr,
    KEY_CODES: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_SCALE_BYTES: tl.constexpr,
    KEY_PAGE_BYTES: tl.constexpr, KEY_LEAST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = 2 * (D + KEY_D)
    program = tl.program_id(0)
    main = tl.program_id(1) == 0
    own = program < sequences
    # All that the program's sequence is asked for, on its way together.
    since = tl.load(start + program, mask=own, other=0)
    many = tl.load(count + program, mask=own, other=0)
    at = tl.load(offset + program, mask=own, other=0).to(tl.int64)
    own_slot = tl.load(slot + program, mask=own, other=0).to(tl.int64)
    first = tl.load(entries + program, mask=own, other=0)
    last = tl.load(entries + program + 1, mask=own, other=0)
    first, last, places = _entries_of(
        program, start, since, many, first, last, sequence, number, sequences, total, MANY
    )
    if main:
        _part(
            rows, ape, tail, norm, cos_sin, start, offset, slot, sequence, number, target, pool, stride, eps,
            first, last, places, since, many, at, own_slot, own, 0, HALF, D, COLS, ROPE, False,
            PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST,
        )  # fmt: skip
    else:
        _part(
            rows, ape, tail, key_norm, cos_sin, start, offset, slot, sequence, number, key_target, keys,
            stride, eps, first, last, places, since, many, at, own_slot, own,
            2 * D, HALF, KEY_D, KEY_COLS, ROPE, HADAMARD,
            KEY_PAGE, KEY_CODED, KEY_PLAIN, KEY_GROUP, KEY_CODES, KEY_SCALES, KEY_SCALE_BYTES,
            KEY_PAGE_BYTES, KEY_LEAST,
        )  # fmt: skip


def compress_c4(
    rows: Tensor,
    ape: Tensor,
    tail: Tensor,
    norm: Tensor,
    key_norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C4Plan,
    pool: Paged,
    keys: Paged,
    eps: float,
    *,
    hadamard: bool,
) -> None:
    """See `weft.kernels.gpu.compress.compress_c4`."""
    sequences, total = plan.start.numel(), plan.sequence.numel()
    rope = cos_sin_entries.shape[1]
    sizes = _constants(norm.numel(), key_norm.numel(), rope, hadamard, pool.layout, keys.layout)
    sizes["MANY"] = entries_of_program(total)
    _compress_c4[(sequences + triton.cdiv(total, sizes["MANY"]), 2)](
        rows, ape, tail, norm, key_norm, cos_sin_entries, plan.start, plan.count, plan.offset, plan.slot,
        plan.entries, plan.sequence, plan.number, plan.target, plan.key_target, pool.bytes, keys.bytes,
        rows.stride(0), eps, sequences, total, **sizes, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def entries_of_program(total: int) -> int:
    """ape, a half of what an entry reads, is read once per program; few programs would leave processors idle."""
    return 4 if total <= 1024 else 8


def _constants(
    dim: int, key_dim: int, rope: int, hadamard: bool, pool: RowLayout, keys: RowLayout
) -> dict[str, Any]:
    sizes = {
        "D": dim,
        "KEY_D": key_dim,
        "COLS": triton.next_power_of_2(dim),
        "KEY_COLS": triton.next_power_of_2(key_dim),
        "ROPE": rope,
        "HADAMARD": hadamard,
    }
    return sizes | layout_constants(pool) | layout_constants(keys, "KEY_")


def aot() -> tuple[AotCase, ...]:
    """The sizes that V4-Flash and V4-Pro share, with either format of keys."""
    signature = dict.fromkeys(("rows", "ape", "tail", "norm", "key_norm", "cos_sin"), "*fp32")
    plan = ("start", "count", "offset", "slot", "entries", "sequence", "number", "target", "key_target")
    signature |= dict.fromkeys(plan, "*i32") | {"pool": "*u8", "keys": "*u8", "stride": "i32", "eps": "fp32"}
    signature |= {"sequences": "i32", "total": "i32"}
    aligned = ("stride", *(name for name, kind in signature.items() if kind.startswith("*")))
    cases = []
    for form, keys in (("fp8", keys_fp8(64, 128)), ("fp4", keys_fp4(64, 128))):
        constants = _constants(512, 128, 64, True, kv_fp8(64, 448, 64), keys) | {"MANY": 4}
        wide = (r"ld\.global\.v4", r"cvt\.rn\.satfinite\.e4m3x2")
        cases.append(
            AotCase(
                f"compress_c4_{form}_keys",
                _compress_c4,
                signature | dict.fromkeys(constants, "constexpr"),
                constants,
                warps=_WARPS,
                expect={"sm90": wide, "sm100": wide},
                aligned=aligned,
                options={"enable_fp_fusion": False},
            )
        )
    return tuple(cases)
