"""Raw state of sequences saved and put back: copies of all layers in one launch each."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _copy(source, target, size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`size` numbers, SIZE or none."""
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(target + column, tl.load(source + column, mask=column < SIZE), mask=column < SIZE)


@triton.jit(do_not_specialize=("slots", "sequences"))
def _save_tails(
    tail, slot, start, out, slots, sequences, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (s * ROWS + r, l): row r of sequence s in layer l."""
    number = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    layer = tl.program_id(1).to(tl.int64)
    place = (tl.load(start + number) + 1 + row) % 8
    source = tail + ((layer * slots + tl.load(slot + number)) * 8 + place) * WIDTH
    _copy(source, out + ((layer * sequences + number) * ROWS + row) * WIDTH, WIDTH, WIDTH, BLOCK)


def save_tails(tail: Tensor, slot: Tensor, start: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.verify.save_tails`; out: what it returns."""
    layers, sequences, rows, width = out.shape
    grid = (sequences * rows, layers)
    _save_tails[grid](tail, slot, start, out, tail.shape[1], sequences, rows, width, _BLOCK, num_warps=_WARPS)


@triton.jit(do_not_specialize=("slots", "sequences", "rows", "tokens", "many", "layers", "folds"))
def _take_back(
    tail, saved, fold, behind, streams, h, told, slots, sequences, rows, tokens, many, layers, folds,
    WIDTH: tl.constexpr, FOLD: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, y) of the i-th sequence: the tail of layer y, then the fold of a layer, then the streams."""
    index = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(told + many + index).to(tl.int64)
    start = tl.load(told + 2 * many + index)
    kept = tl.load(told + 4 * many + index)
    if part < layers:
        number = tl.load(told + index).to(tl.int64)
        layer = part.to(tl.int64)
        for row in range(kept - 1, tl.load(told + 3 * many + index) - 1):
            source = saved + ((layer * sequences + number) * rows + row) * WIDTH
            target = tail + ((layer * slots + slot) * 8 + (start + 1 + row) % 8) * WIDTH
            _copy(source, target, WIDTH, WIDTH, BLOCK)
    else:
        if part < layers + folds:
            layer = (part - layers).to(tl.int64)
            row = tl.load(told + 5 * many + index) + kept - 1
            size = tl.where((start + kept) % 128 > 0, FOLD, 0)
            _copy(behind + (layer * tokens + row) * FOLD, fold + (layer * slots + slot) * FOLD, size, FOLD, BLOCK)
        else:
            _copy(h + index.to(tl.int64) * STREAM, streams + slot * STREAM, STREAM, STREAM, BLOCK)


def take_back(
    tail: Tensor, saved: Tensor, fold: Tensor, behind: Tensor, streams: Tensor, h: Tensor, told: Tensor
) -> None:
    """See `weft.kernels.gpu.verify.take_back`."""
    layers, sequences, rows, width = saved.shape
    folds, slots = len(fold), len(streams)
    grid = (told.shape[1], layers + folds + 1)
    _take_back[grid](
        tail, saved, fold, behind, streams, h, told, slots, sequences, rows, behind.shape[1], told.shape[1],
        layers, folds, WIDTH=width, FOLD=3 * fold.shape[3], STREAM=streams[0].numel(), BLOCK=_BLOCK,
        num_warps=_WARPS,
    )  # fmt: skip


def aot() -> tuple[AotCase, ...]:
    """V4-Flash."""
    numbers = dict.fromkeys(("slots", "sequences"), "i32")
    tensors = {"tail": "*fp32", "slot": "*i32", "start": "*i32", "out": "*fp32"}
    constants = {"ROWS": 1, "WIDTH": 2560, "BLOCK": _BLOCK}
    wide = {arch: (r"ld\.global\.v4", r"st\.global\.v4") for arch in ("sm90", "sm100")}
    signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
    saving = AotCase("save_tails", _save_tails, signature, constants, warps=_WARPS, expect=wide)
    tensors = dict.fromkeys(("tail", "saved", "fold", "behind"), "*fp32")
    tensors |= {"streams": "*bf16", "h": "*bf16", "told": "*i32"}
    numbers |= dict.fromkeys(("rows", "tokens", "many", "layers", "folds"), "i32")
    constants = {"WIDTH": 2560, "FOLD": 1536, "STREAM": 16384, "BLOCK": _BLOCK}
    signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
    return saving, AotCase("take_back", _take_back, signature, constants, warps=_WARPS, expect=wide)
