"""Drawing tokens: the best of every row, then, of rows that are not greedy, the best with noise added.

The noise is added to float32 differences to the best over the temperature, so the best comes first; its launch is
all that greedy rows need. Noise in float64 costs more than reading the scores, so a block computes it only if, by
a limit in float32, one of its tokens may beat the row's best token with its own noise. In between, rows with top_k
or top_p have their cut found (`sampling_cut`).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: SIM102 -- one condition of a compiled kernel and one of its data are two ifs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.sampling import BLOCK, Refused, RowSettings, Scores
from weft.kernels.triton.sampling_adjust import adjust, adjust_cases
from weft.kernels.triton.sampling_cut import CUT_WARPS, collect_kernel, cut_kernel, cut_sizes, weigh_kernel
from weft.kernels.triton.sampling_odds import chances_kernel, judge_kernel, total_kernel
from weft.kernels.triton.sampling_parts import (
    NONE,
    arrives_last,
    gumbel,
    gumbel_limit,
    is_kept,
    load_scores,
    noise_bits,
    over_temperature,
    row_best,
    row_mask,
    row_source,
    weight_of,
)
from weft.kernels.triton.topk import ordered

_WARPS = 8
_DRAW_WARPS = 16  # two logarithms in float64 for every score


@triton.jit(do_not_specialize=("width", "blocks"))
def best_kernel(
    keys, spots, tokens, counters, temperature, logits, stride, copies, edit_slots, left, words, mask_slots,
    width, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """One program: one block of one row. The last one of a greedy row writes its token."""
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    key = ordered(load_scores(source, words, held, column, valid, MASKS), valid)
    top = tl.max(key)
    tl.store(keys + row * blocks + block, top)
    tl.store(spots + row * blocks + block, tl.min(tl.where(key == top, column, NONE)))
    if GREEDY:
        if tl.load(temperature + row) == 0.0:
            if arrives_last(counters + row, blocks):
                _, spot = row_best(keys, spots, row, blocks, BLOCKS)
                tl.store(tokens + row, spot)


@triton.jit
def best_of(value, column, valid):
    """(the greatest float64, the lowest column that has it)."""
    top = tl.max(tl.where(valid, value, float("-inf")))
    return top, tl.min(tl.where(valid & (value == top), column, NONE))


@triton.jit
def merged(tops, at, first, blocks, BLOCKS: tl.constexpr):
    """`best_of` all blocks of a row."""
    block = tl.arange(0, BLOCKS)
    valid = block < blocks
    value = tl.load(tops + first + block, mask=valid, other=float("-inf"), cache_modifier=".cg")
    column = tl.load(at + first + block, mask=valid, other=NONE, cache_modifier=".cg")
    return best_of(value, column, valid)


@triton.jit
def more_than(odds, totals, row, blocks, scaled, kept, column, valid, BLOCKS: tl.constexpr):
    """[BLOCK] float64 log weights of what the distribution has more of than `odds`, -inf where it has not."""
    block = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(totals + row * blocks + block, mask=block < blocks, other=0.0))
    more = weight_of(scaled, kept) / total - tl.load(odds + column, mask=valid, other=0.0)
    return tl.where(more > 0.0, tl.log(tl.where(more > 0.0, more, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=("width", "blocks"))
def draw_kernel(
    tokens, tops, at, counters, rows, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p, noise,
    logits, stride, copies, edit_slots, left, words, mask_slots, refused, refused_slots, totals, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr, FILTERS: tl.constexpr,
    REFUSED: tl.constexpr,
):  # fmt: skip
    """One program: one block of one row that is not greedy; the last one writes the row's token. tops, at:
    [2, w, blocks], the second of them for `refused`."""
    row = tl.load(rows + tl.program_id(0) // blocks)
    block = tl.program_id(0) % blocks
    own = tl.program_id(0) - block
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    best, lead = row_best(keys, spots, row, blocks, BLOCKS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    x = load_scores(source, words, held, column, valid, MASKS)
    scaled = over_temperature(x, best, tl.load(temperature + row))
    kept = is_kept(scaled, column, valid, row, top_k, top_p, min_p, cuts, bounds, FILTERS)
    key = tl.load(noise + row)
    bits = noise_bits(key, column)
    if REFUSED:
        slot = tl.load(refused_slots + row)
        second_tops = tops + tl.num_programs(0)
        second_at = at + tl.num_programs(0)
        if slot >= 0:
            odds = refused + slot.to(tl.int64) * width
            excess = more_than(odds, totals, row, blocks, scaled, kept, column, valid, BLOCKS)
            top, spot = best_of(excess + gumbel(bits), column, valid)
            tl.store(second_tops + own + block, top)
            tl.store(second_at + own + block, spot)
    limit = tl.max(tl.where(kept, scaled + gumbel_limit(bits), float("-inf")))
    if limit >= gumbel(noise_bits(key, lead)):
        top, spot = best_of(tl.where(kept, scaled.to(tl.float64) + gumbel(bits), float("-inf")), column, valid)
        tl.store(tops + own + block, top)
        tl.store(at + own + block, spot)
    else:
        tl.store(tops + own + block, float("-inf"))
        tl.store(at + own + block, block * BLOCK)
    if arrives_last(counters + row, blocks):
        top, spot = merged(tops, at, own, blocks, BLOCKS)
        if REFUSED:
            if slot >= 0:
                top, other = merged(second_tops, second_at, own, blocks, BLOCKS)
                spot = tl.where(top > float("-inf"), other, spot)  # equal but for rounding
        tl.store(tokens + row, spot)


class _Rows:
    """One call's rows: what all its launches are given, and what they find on the way."""

    def __init__(self, scores: Scores, settings: RowSettings) -> None:
        logits, masks, edits = scores.logits, scores.masks, scores.edits
        rows, width = logits.shape
        self.settings = settings
        self.blocks = triton.cdiv(width, BLOCK)
        self.count = rows
        self.device = logits.device
        none = settings.counters  # read by no kernel
        copies, slots, left = logits, none, none
        if edits is not None and len(edits.rows):
            copies, slots, left = adjust(scores, edits), edits.slots, edits.left
        held = masks is not None and len(masks.words) > 0
        words, mask_slots = (masks.words, masks.slots) if masks is not None and held else (none, none)
        self.scores = (logits, logits.stride(0), copies, slots, left, words, mask_slots)
        self.sizes = (width, self.blocks)
        self.constants = {
            "BLOCK": BLOCK,
            "BLOCKS": triton.next_power_of_2(self.blocks),
            "EDITS": copies is not logits,
            "MASKS": held,
            "num_warps": _WARPS,
        }
        self.keys = self._new(torch.int32)
        self.spots = self._new(torch.int32)
        # One each: a pointer that is sometimes less aligned would have kernels compiled again.
        cuts = [torch.empty(rows, dtype=torch.int32, device=self.device) for _ in range(2)]
        self.filters = (self.keys, self.spots, *cuts, settings.temperature)
        self.filters += (settings.top_k, settings.top_p, settings.min_p)

    def _new(self, kind: torch.dtype) -> Tensor:
        return torch.empty(self.count, self.blocks, dtype=kind, device=self.device)

    def best(self) -> Tensor:
        """Find every row's best; the tokens of greedy rows are written."""
        tokens = torch.empty(self.count, dtype=torch.int32, device=self.device)
        given = (self.keys, self.spots, tokens, self.settings.counters, self.settings.temperature)
        greedy = {"GREEDY": not self.settings.all_warm}
        best_kernel[(self.count * self.blocks,)](*given, *self.scores, *self.sizes, **self.constants, **greedy)
        return tokens

    def cut(self) -> dict[str, Any]:
        """Find what top_k and top_p keep of the rows that have one; the constants of what uses it."""
        rows = self.settings.filtered
        if len(rows):
            sizes = cut_sizes(self.sizes[0])
            found = torch.empty(len(rows), self.blocks, sizes["PIVOTS"], dtype=torch.int32, device=self.device)
            weights = torch.empty_like(found, dtype=torch.float64)
            near = torch.empty(len(rows), self.sizes[0], dtype=torch.int32, device=self.device)
            ends = torch.empty(4, len(rows), dtype=torch.int32, device=self.device)
            aims = torch.empty(2, len(rows), dtype=torch.float64, device=self.device)
            grid = (len(rows) * self.blocks,)
            given = (*self.filters, *self.scores, *self.sizes)
            weigh_kernel[grid](
                found, weights, ends, aims, self.settings.counters, rows, *given, **self.constants, **sizes
            )
            collect_kernel[grid](found, near, ends, aims, rows, *given, **self.constants, **sizes)
            more = self.constants | sizes | {"num_warps": CUT_WARPS}
            cut_kernel[(len(rows),)](found, near, ends, aims, rows, *given, **more)
        return self.constants | {"FILTERS": len(rows) > 0}

    def totals(self, constants: dict[str, Any]) -> Tensor:
        """[n, blocks] float64 weights of what is kept, of rows that are not greedy."""
        totals = self._new(torch.float64)
        warm = self.settings.warm
        if len(warm):
            given = (totals, warm, *self.filters, *self.scores, *self.sizes)
            total_kernel[(len(warm) * self.blocks,)](*given, **constants)
        return totals

    def draw(self, tokens: Tensor, constants: dict[str, Any], refused: Refused | None) -> None:
        settings = self.settings
        odds, slots, totals = settings.top_p, settings.counters, settings.top_p
        if refused is not None:
            odds, slots, totals = refused.odds, refused.slots, self.totals(constants)
        shape = 2, len(settings.warm), self.blocks
        tops = torch.empty(shape, dtype=torch.float64, device=self.device)
        at = torch.empty(shape, dtype=torch.int32, device=self.device)
        given = (tokens, tops, at, settings.counters, settings.warm, *self.filters, settings.keys, *self.scores)
        constants = constants | {"REFUSED": refused is not None, "num_warps": _DRAW_WARPS}
        draw_kernel[(len(settings.warm) * self.blocks,)](*given, odds, slots, totals, *self.sizes, **constants)


def sample_rows(scores: Scores, settings: RowSettings, refused: Refused | None) -> Tensor:
    """As the wrapper of this name."""
    rows = _Rows(scores, settings)
    tokens = rows.best()
    if len(settings.warm):
        rows.draw(tokens, rows.cut(), refused)
    return tokens


def distribution_rows(scores: Scores, settings: RowSettings) -> Tensor:
    """As the wrapper of this name."""
    rows = _Rows(scores, settings)
    rows.best()
    constants = rows.cut()
    out = torch.empty(scores.logits.shape, dtype=torch.float64, device=rows.device)
    given = (out, rows.totals(constants), *rows.filters, *rows.scores, *rows.sizes)
    chances_kernel[(rows.count * rows.blocks,)](*given, **constants)
    return out


def judge_rows(scores: Scores, settings: RowSettings, drafts: Tensor, odds: Tensor) -> Tensor:
    """As the wrapper of this name."""
    rows = _Rows(scores, settings)
    out = rows.best()  # what it writes of greedy rows is written over
    constants = rows.cut()
    given = (out, drafts, odds, settings.keys, rows.totals(constants), *rows.filters, *rows.scores, *rows.sizes)
    judge_kernel[(rows.count,)](*given, **constants | {"num_warps": 1})
    return out


def aot() -> tuple[AotCase, ...]:
    """V4's vocabulary, in 64 blocks a row; with everything on that adds instructions, and plain draws."""
    blocks = 64
    plain = {"BLOCK": BLOCK, "BLOCKS": blocks, "EDITS": False, "MASKS": False}
    full = {"BLOCK": BLOCK, "BLOCKS": blocks, "EDITS": True, "MASKS": True}
    filters, cut = {"FILTERS": True}, cut_sizes(129280)
    f64 = {"sm90": (r"DFMA", r"DADD"), "sm100": (r"DFMA", r"DADD")}
    return (
        _case("best of greedy rows", best_kernel, full | {"GREEDY": True}),
        _case("draw", draw_kernel, plain | {"FILTERS": False, "REFUSED": False}, _DRAW_WARPS, f64),
        _case("draw, all filters", draw_kernel, full | filters | {"REFUSED": False}, _DRAW_WARPS, f64),
        _case("draw, refused", draw_kernel, full | filters | {"REFUSED": True}, _DRAW_WARPS, f64),
        _case("weights above pivots", weigh_kernel, full | cut, expect=f64),
        _case("tokens near the cut", collect_kernel, full | cut),
        _case("cut", cut_kernel, full | cut, warps=CUT_WARPS, expect=f64),
        _case("weight of what is kept", total_kernel, full | filters, expect=f64),
        _case("probabilities", chances_kernel, full | filters, expect=f64),
        _case("judge", judge_kernel, full | filters, warps=1),
        *(_case(*case) for case in adjust_cases()),
    )


# Triton types of pointers; those not named are int32.
_KINDS = {
    **dict.fromkeys(("logits", "copies", "temperature", "values"), "*fp32"),
    **dict.fromkeys(("top_p", "min_p", "totals", "tops", "refused", "weights", "odds", "aims"), "*fp64"),
    "noise": "*i64",
    **dict.fromkeys(("stride", "width", "blocks"), "i32"),
}


def _case(
    name: str, kernel: Any, constants: dict[str, Any], warps: int = _WARPS, expect: Any = None, options: Any = None
) -> AotCase:
    kinds = _KINDS | ({"out": "*fp64"} if kernel is chances_kernel else {})
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*i32") for n in kernel.arg_names}
    aligned = (*(n for n, kind in signature.items() if kind[0] == "*"), "stride")
    aligned = tuple(n for n in aligned if n in signature)
    return AotCase(
        f"sampling: {name}",
        kernel,
        signature,
        constants,
        warps=warps,
        aligned=aligned,
        expect=expect or {},
        options=options or {},
    )
