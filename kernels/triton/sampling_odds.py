"""The probabilities that tokens are drawn with, and whether drafts are accepted by them."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.sampling_parts import (
    is_kept,
    load_scores,
    noise_bits,
    over_temperature,
    row_best,
    row_mask,
    row_source,
    uniform,
    weight_of,
)


@triton.jit(do_not_specialize=("width", "blocks"))
def total_kernel(
    totals, rows, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One program: the weight of what is kept of one block of one row that is not greedy."""
    row = tl.load(rows + tl.program_id(0) // blocks)
    block = tl.program_id(0) % blocks
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    best, _lead = row_best(keys, spots, row, blocks, BLOCKS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    x = load_scores(source, words, held, column, valid, MASKS)
    scaled = over_temperature(x, best, tl.load(temperature + row))
    kept = is_kept(scaled, column, valid, row, top_k, top_p, min_p, cuts, bounds, FILTERS)
    tl.store(totals + row * blocks + block, tl.sum(weight_of(scaled, kept)))


@triton.jit
def chance(
    totals, row, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p, source, words, held, column, valid,
    blocks, BLOCKS: tl.constexpr, MASKS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """float64 probabilities that columns are drawn with."""
    best, lead = row_best(keys, spots, row, blocks, BLOCKS)
    heat = tl.load(temperature + row)
    if heat == 0.0:
        odds = tl.where(column == lead, 1.0, 0.0).to(tl.float64)
    else:
        block = tl.arange(0, BLOCKS)
        total = tl.sum(tl.load(totals + row * blocks + block, mask=block < blocks, other=0.0))
        x = load_scores(source, words, held, column, valid, MASKS)
        scaled = over_temperature(x, best, heat)
        kept = is_kept(scaled, column, valid, row, top_k, top_p, min_p, cuts, bounds, FILTERS)
        odds = weight_of(scaled, kept) / total
    return odds


@triton.jit(do_not_specialize=("width", "blocks"))
def chances_kernel(
    out, totals, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One program: the probabilities of one block of one row."""
    row = tl.program_id(0) // blocks
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    odds = chance(
        totals, row, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p, source, words, held, column,
        valid, blocks, BLOCKS, MASKS, FILTERS,
    )  # fmt: skip
    tl.store(out + row.to(tl.int64) * width + column, odds, mask=valid)


@triton.jit(do_not_specialize=("width", "blocks"))
def judge_kernel(
    out, drafts, odds, noise, totals, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One program: the draft of one row."""
    row = tl.program_id(0)
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    draft = tl.load(drafts + row) + tl.zeros([1], tl.int32)
    odds_here = chance(
        totals, row, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p, source, words, held, draft,
        draft >= 0, blocks, BLOCKS, MASKS, FILTERS,
    )  # fmt: skip
    ratio = odds_here / tl.load(odds + row)
    number = uniform(noise_bits(tl.load(noise + row), tl.zeros([1], tl.int32)))
    tl.store(out + row + tl.zeros([1], tl.int32), tl.where(number < ratio, draft, -1))
