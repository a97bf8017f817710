"""The lists, plans and rotations of a step in one launch; embeddings in, last streams out.

The first programs have a token each, or a part of its c128a columns; those behind them some entries. A program
finds its sequence by comparing its row with all sequences' ends, a tile at a time: there are a few hundred.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase

if TYPE_CHECKING:
    from weft.kernels.gpu.steps import Entries, EntrySpans, StepIndex, StepSizes, StepSpans

_WARPS = 4
# c128a columns of one program, entries of one, and sequences compared at a time.
_CHUNK = 1024
_ENTRIES = 16
_SEQUENCES = 128
# Numbers of a row of streams or of an embedding that one program copies.
_COPIED = 4096

# Changing from step to step: specialised for no value, so that serving compiles nothing.
_LOOSE = (
    "tokens", "sequences", "parts", "c4_many", "c128_many", "c4_programs", "window_pages", "c4_pages",
    "c128_pages", "columns", "c4_base", "c128_base",
)  # fmt: skip


@triton.jit
def _owner(offset, count, sequences, token, SEQUENCES: tl.constexpr):
    """The sequence of a row, and whether it has one: rows behind the last sequence's pad."""
    behind = token * 0
    total = token * 0
    for first in range(0, sequences, SEQUENCES):
        one = first + tl.arange(0, SEQUENCES)
        there = one < sequences
        end = tl.load(offset + one, mask=there, other=0) + tl.load(count + one, mask=there, other=0)
        behind += tl.sum((there & (end <= token)).to(tl.int32), 0)
        total = tl.maximum(total, tl.max(end, 0))
    real = token < total
    return tl.where(real, behind, 0), real


@triton.jit
def _turn(out, row, position, plain, mask, ROPE: tl.constexpr, PAIRS: tl.constexpr):
    """Rotations [R, rope] at row [R] of positions [R]: cosines, then sines. mask: [R]."""
    pair = tl.arange(0, PAIRS)
    keep = mask[:, None] & (pair < ROPE // 2)[None, :]
    frequency = tl.load(plain + pair, mask=pair < ROPE // 2, other=0.0)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    at = out + row[:, None] * ROPE + pair[None, :]
    tl.store(at, tl.cos(angle), mask=keep)
    tl.store(at + ROPE // 2, tl.sin(angle), mask=keep)


@triton.jit
def _rows_of(table, owner, pages, place, mask, base, PAGE: tl.constexpr):
    """Rows of the pool at some places of a sequence; -1 where mask is not set."""
    number = tl.load(table + owner * pages + place // PAGE, mask=mask, other=0)
    return tl.where(mask, base + number * PAGE + place % PAGE, -1)


@triton.jit
def _token(
    start, count, offset, window_first, window, c4_table, plain, compressed,
    position, sequence, window_rows, c4_visible, plain_turn, compressed_turn,
    window_index, window_lengths, c4_index, c4_lengths, c128_index, c128_lengths,
    token, sequences, window_pages, c4_pages, columns, c4_base,
    PAGE: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    ROPE: tl.constexpr, PAIRS: tl.constexpr, SEQUENCES: tl.constexpr, HAS_C4: tl.constexpr, HAS_C128: tl.constexpr,
):  # fmt: skip
    """All of a token but its c128a columns."""
    owner, real = _owner(offset, count, sequences, token, SEQUENCES)
    at = tl.where(real, tl.load(start + owner) + token - tl.load(offset + owner), 0)
    old = tl.load(window_first + owner)
    tl.store(position + token, at)
    tl.store(sequence + token, owner)
    row = token.to(tl.int64)
    length = tl.where(real, tl.minimum(at + 1, W), 0)
    one = tl.zeros([1], tl.int32)
    own = _rows_of(window, owner, window_pages, at - old * PAGE + one, one < length, 0, PAGE)
    tl.store(window_rows + token + one, own)
    column = tl.arange(0, WB)
    place = tl.maximum(at - (W - 1), 0) + column
    index = _rows_of(window, owner, window_pages, place - old * PAGE, column < length, 0, PAGE)
    tl.store(window_index + row * W + column, index, mask=column < W)
    tl.store(window_lengths + token, length)
    visible = tl.where(real, (at + 1) // 4, 0)
    tl.store(c4_visible + token, visible)
    if HAS_C4:
        entry = tl.arange(0, KB)
        many = tl.minimum(visible, K)
        line = c4_index + row * (W + K)
        tl.store(line + column, index, mask=column < W)
        chosen = _rows_of(c4_table, owner, c4_pages, entry, entry < many, c4_base, PAGE)
        tl.store(line + W + entry, chosen, mask=entry < K)
        tl.store(c4_lengths + token, tl.where(many > 0, W + many, length))
    if HAS_C128:
        many = tl.minimum(tl.where(real, (at + 1) // 128, 0), columns)
        tl.store(c128_index + row * (W + columns) + column, index, mask=column < W)
        tl.store(c128_lengths + token, tl.where(many > 0, W + many, length))
    _turn(plain_turn, row + one, at + one, plain, one == 0, ROPE, PAIRS)
    _turn(compressed_turn, row + one, at + one, compressed, one == 0, ROPE, PAIRS)


@triton.jit
def _columns(
    start, count, offset, table, index, token, part, sequences, pages, columns, base,
    PAGE: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """A part of a token's c128a columns."""
    owner, real = _owner(offset, count, sequences, token, SEQUENCES)
    visible = (tl.load(start + owner) + token - tl.load(offset + owner) + 1) // 128
    visible = tl.where(real, tl.minimum(visible, columns), 0)
    entry = part * CHUNK + tl.arange(0, CHUNK)
    row = _rows_of(table, owner, pages, entry, entry < visible, base, PAGE)
    tl.store(index + token.to(tl.int64) * (W + columns) + W + entry, row, mask=entry < columns)


@triton.jit
def _entries(
    first, entries, table, frequencies, sequence, number, target, key_target, turn,
    program, sequences, many, pages, base, RATIO: tl.constexpr,
    PAGE: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Some entries of a plan."""
    index = program * COUNT + tl.arange(0, COUNT)
    owner = tl.zeros([COUNT], tl.int32)
    for begin in range(0, sequences, SEQUENCES):
        one = begin + tl.arange(0, SEQUENCES)
        end = tl.load(entries + 1 + one, mask=one < sequences, other=2147483647)
        owner += tl.sum((end[None, :] <= index[:, None]).to(tl.int32), 1)
    real = owner < sequences
    keep = index < many
    place = index - tl.load(entries + owner, mask=real, other=0)
    entry = tl.where(real, tl.load(first + owner, mask=real, other=0) + place, 0)
    row = _rows_of(table, owner, pages, entry, real & keep, 0, PAGE)
    tl.store(sequence + index, tl.where(real, owner, -1), mask=keep)
    tl.store(number + index, entry, mask=keep)
    tl.store(key_target + index, row, mask=keep)
    tl.store(target + index, tl.where(real, row + base, -1), mask=keep)
    _turn(turn, index.to(tl.int64), entry * RATIO, frequencies, keep, ROPE, PAIRS)


@triton.jit(do_not_specialize=_LOOSE)
def _step_index(
    start, count, offset, window_first, window, c4_first, c4_ends, c4_table, c128_first, c128_ends, c128_table,
    plain, compressed,
    position, sequence, window_rows, c4_visible, plain_turn, compressed_turn,
    window_index, window_lengths, c4_index, c4_lengths, c128_index, c128_lengths,
    c4_sequence, c4_number, c4_target, c4_key_target, c4_turn,
    c128_sequence, c128_number, c128_target, c128_key_target, c128_turn,
    tokens, sequences, parts, c4_many, c128_many, c4_programs, window_pages, c4_pages, c128_pages, columns,
    c4_base, c128_base,
    PAGE: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    ROPE: tl.constexpr, PAIRS: tl.constexpr, HAS_C4: tl.constexpr, HAS_C128: tl.constexpr,
    CHUNK: tl.constexpr, COUNT: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < tokens * parts:
        token = program // parts
        part = program % parts
        if part == 0:
            _token(
                start, count, offset, window_first, window, c4_table, plain, compressed,
                position, sequence, window_rows, c4_visible, plain_turn, compressed_turn,
                window_index, window_lengths, c4_index, c4_lengths, c128_index, c128_lengths,
                token, sequences, window_pages, c4_pages, columns, c4_base,
                PAGE, W, WB, K, KB, ROPE, PAIRS, SEQUENCES, HAS_C4, HAS_C128,
            )  # fmt: skip
        else:
            _columns(
                start, count, offset, c128_table, c128_index, token, part - 1, sequences, c128_pages, columns,
                c128_base, PAGE, W, CHUNK, SEQUENCES,
            )  # fmt: skip
    else:
        rest = program - tokens * parts
        if rest < c4_programs:
            _entries(
                c4_first, c4_ends, c4_table, compressed, c4_sequence, c4_number, c4_target, c4_key_target, c4_turn,
                rest, sequences, c4_many, c4_pages, c4_base, 4, PAGE, ROPE, PAIRS, COUNT, SEQUENCES,
            )  # fmt: skip
        else:
            _entries(
                c128_first, c128_ends, c128_table, compressed, c128_sequence, c128_number, c128_target,
                c128_key_target, c128_turn, rest - c4_programs, sequences, c128_many, c128_pages, c128_base, 128,
                PAGE, ROPE, PAIRS, COUNT, SEQUENCES,
            )  # fmt: skip


def step_index(spans: StepSpans, sizes: StepSizes, plain: Tensor, compressed: Tensor, out: StepIndex) -> None:
    """See `weft.kernels.gpu.steps.step_index`; out: what it returns."""
    sequences = spans.start.numel()
    c4, c4_pages = _kind(spans.c4, spans.start)
    c128, c128_pages = _kind(spans.c128, spans.start)
    columns = sizes.columns if spans.c128 else 0
    parts = 1 + triton.cdiv(columns, _CHUNK)
    c4_programs = triton.cdiv(sizes.c4_entries, _ENTRIES)
    programs = sizes.tokens * parts + c4_programs + triton.cdiv(sizes.c128_entries, _ENTRIES)
    _step_index[(programs,)](
        spans.start, spans.count, spans.offset, spans.window_first, spans.window, *c4, *c128, plain, compressed,
        out.position, out.sequence, out.window_rows, out.c4_visible, out.plain, out.compressed,
        out.window.index, out.window.lengths, out.c4.index, out.c4.lengths, out.c128.index, out.c128.lengths,
        *_made(out.c4_entries), *_made(out.c128_entries),
        sizes.tokens, sequences, parts, sizes.c4_entries, sizes.c128_entries, c4_programs,
        spans.window.shape[1], c4_pages, c128_pages, columns, sizes.c4_base, sizes.c128_base,
        **_constants(sizes, 2 * plain.numel(), spans.c4 is not None, spans.c128 is not None), num_warps=_WARPS,
    )  # fmt: skip


def _kind(kind: EntrySpans | None, other: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Pointers, and pages of a row of the table; of a kind that there is not, pointers that are not read."""
    return (
        ((other, other, other), 0)
        if kind is None
        else ((kind.first, kind.entries, kind.table), kind.table.shape[1])
    )


def _made(entries: Entries) -> tuple[Tensor, ...]:
    return entries.sequence, entries.number, entries.target, entries.key_target, entries.turn


def _constants(sizes: StepSizes, rope: int, c4: bool, c128: bool) -> dict[str, object]:
    return {
        "PAGE": sizes.page,
        "W": sizes.window,
        "WB": triton.next_power_of_2(sizes.window),
        "K": sizes.top_k,
        "KB": triton.next_power_of_2(sizes.top_k),
        "ROPE": rope,
        "PAIRS": triton.next_power_of_2(rope // 2),
        "HAS_C4": c4,
        "HAS_C128": c128,
        "CHUNK": _CHUNK,
        "COUNT": _ENTRIES,
        "SEQUENCES": _SEQUENCES,
    }


@triton.jit
def _embed_streams(weight, ids, out, D: tl.constexpr, COLS: tl.constexpr, STREAMS: tl.constexpr):
    """Program (t, b): block b of the channels of token t."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    chosen = tl.load(ids + token).to(tl.int64)
    value = tl.load(weight + chosen * D + column, mask=column < tl.where(chosen >= 0, D, 0), other=0.0)
    for stream in tl.static_range(STREAMS):
        tl.store(out + (token * STREAMS + stream) * D + column, value, mask=column < D)


def embed_streams(weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.steps.embed_streams`; out: what it returns."""
    tokens, streams, dim = out.shape
    block = min(1024, triton.next_power_of_2(dim))
    _embed_streams[(tokens, triton.cdiv(dim, block))](weight, ids, out, dim, block, streams, num_warps=_WARPS)


@triton.jit
def _store_rows(rows, source, target, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, b): block b of the i-th row that is copied."""
    one = tl.program_id(0)
    old = tl.load(source + one).to(tl.int64)
    new = tl.load(target + one).to(tl.int64)
    if old >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(rows + old * SIZE + column, mask=column < SIZE)
        tl.store(out + new * SIZE + column, value, mask=column < SIZE)


def store_rows(rows: Tensor, source: Tensor, target: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.steps.store_rows`."""
    size = rows[0].numel()
    block = min(_COPIED, triton.next_power_of_2(size))
    grid = (source.numel(), triton.cdiv(size, block))
    _store_rows[grid](rows, source, target, out, size, block, num_warps=_WARPS)


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes; V4-Pro's differ in how many entries are chosen."""
    from weft.kernels.gpu.steps import StepSizes

    cases = []
    for name, chosen in (("flash", 512), ("pro", 1024)):
        constants = _constants(StepSizes(1, 128, chosen, 16, 1, 1, 64, 0, 0), 64, True, True)
        signature = {}
        for argument in _step_index.arg_names:
            wide = argument in ("plain", "compressed") or argument.endswith("_turn")
            number = "i32" if argument in _LOOSE else "*fp32" if wide else "*i32"
            signature[argument] = "constexpr" if argument in constants else number
        # The angle of a far position is reduced with a table of digits of 2 / pi, indexed in local memory.
        cases.append(AotCase(f"step_index_{name}", _step_index, signature, constants, warps=_WARPS, spills=64))
    copied = {"D": 4096, "COLS": 1024, "STREAMS": 4}
    kinds = {"weight": "*bf16", "ids": "*i32", "out": "*bf16"} | dict.fromkeys(copied, "constexpr")
    cases.append(AotCase("embed_streams", _embed_streams, kinds, copied, warps=_WARPS))
    stored = {"SIZE": 16384, "BLOCK": _COPIED}
    kinds = {"rows": "*bf16", "source": "*i32", "target": "*i32", "out": "*bf16"} | dict.fromkeys(
        stored, "constexpr"
    )
    cases.append(AotCase("store_rows", _store_rows, kinds, stored, warps=_WARPS))
    return tuple(cases)
