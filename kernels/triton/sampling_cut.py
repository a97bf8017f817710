"""Where top_k and top_p cut a row, without sorting it.

Three launches. Weights and numbers of tokens above a few pivots bracket the cut; tokens above the lower end of the
bracket are collected, by id; and one program a row bisects their keys for the greatest that enough of the row
reaches. Of the tokens that have just that key, the lower ids are kept, up to a bound. Keys are integers of the
order of float32, so the cut is exact. Sums are float64, over blocks and collected tokens in their order.

Lists of up to TILE tokens, about what a language model's filters keep at most, stay in registers; longer ones are
read again at each step.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.sampling_parts import (
    LOWEST,
    arrives_last,
    load_scores,
    over_temperature,
    row_best,
    row_mask,
    row_source,
    weight_of,
)
from weft.kernels.triton.topk import ordered

TILE = 4096
CUT_WARPS = 8
_CHUNK = 256


def cut_sizes(width: int) -> dict[str, int]:
    """Constants of both kernels, for rows of `width`."""
    return {"PIVOTS": 16, "CHUNK": _CHUNK, "TILE": min(TILE, max(256, triton.next_power_of_2(width)))}


@triton.jit
def pivot_keys(temperature, top_k, PIVOTS: tl.constexpr):
    """[PIVOTS] keys, descending: 1 to 8, then 12, 16, 24, 32 .. 96 below the best, then the lowest there is. In
    units of logits for top_k, whose cut does not depend on the temperature; else of logarithms of weights."""
    j = tl.arange(0, PIVOTS)
    far = tl.where((j & 1) == 0, 12, 16) << tl.maximum((j - 8) >> 1, 0)
    step = tl.where(j < 8, j + 1, far).to(tl.float32)
    one = tl.full([PIVOTS], 1.0, tl.float32)
    unit = tl.where(top_k > 0, tl.div_rn(one, one * temperature), one)
    return ordered(tl.where(j == PIVOTS - 1, float("-inf"), -step * unit), j >= 0)


@triton.jit
def bracket(found, weights, first, pivots, k, p, blocks, BLOCKS: tl.constexpr, PIVOTS: tl.constexpr):
    """(a pivot that all that is kept reaches, its key, one above the cut, how many tokens reach the former, number
    or weight of what reaches the latter, the weight that is to be kept)."""
    at = tl.arange(0, BLOCKS)[:, None]
    j = tl.arange(0, PIVOTS)
    place = (first + at) * PIVOTS + j[None, :]
    number = tl.sum(tl.load(found + place, mask=at < blocks, other=0, cache_modifier=".cg"), 0)
    weight = tl.sum(tl.load(weights + place, mask=at < blocks, other=0.0, cache_modifier=".cg"), 0)
    target = p * tl.sum(tl.where(j == PIVOTS - 1, weight, 0.0))
    lowest = tl.min(tl.where(tl.where(k > 0, number >= k, weight >= target), j, PIVOTS - 1))
    low = tl.sum(tl.where(j == lowest, pivots, 0))
    high = tl.where(lowest == 0, 1, tl.sum(tl.where(j == lowest - 1, pivots, 0)))
    count = tl.sum(tl.where(j == lowest, number, 0))
    reached = tl.where(k > 0, number.to(tl.float64), weight)
    return lowest, low, high, count, tl.sum(tl.where(j == lowest - 1, reached, 0.0)), target


@triton.jit(do_not_specialize=("width", "blocks"))
def weigh_kernel(
    found, weights, ends, aims, counters, rows, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr,
    PIVOTS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: how many tokens of one block reach each pivot, and their weight. found, weights:
    [f, blocks, PIVOTS] int32 and float64."""
    row = tl.load(rows + tl.program_id(0) // blocks)
    block = tl.program_id(0) % blocks
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    best, _lead = row_best(keys, spots, row, blocks, BLOCKS)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    pivots = pivot_keys(heat, k, PIVOTS)
    number = tl.zeros([PIVOTS, CHUNK], tl.int32)
    weight = tl.zeros([PIVOTS, CHUNK], tl.float64)
    for first in range(block * BLOCK, block * BLOCK + BLOCK, CHUNK):
        column = first + tl.arange(0, CHUNK)
        valid = column < width
        scaled = over_temperature(load_scores(source, words, held, column, valid, MASKS), best, heat)
        reaches = ordered(scaled, valid)[None, :] >= pivots[:, None]
        number += reaches.to(tl.int32)
        weight += tl.where(reaches, weight_of(scaled, valid)[None, :], 0.0)
    at = tl.program_id(0) * PIVOTS + tl.arange(0, PIVOTS)
    tl.store(found + at, tl.sum(number, 1))
    tl.store(weights + at, tl.sum(weight, 1))
    if arrives_last(counters + row, blocks):
        index = tl.program_id(0) // blocks
        size = tl.num_programs(0) // blocks
        lowest, low, high, count, reached, target = bracket(
            found, weights, index * blocks, pivots, k, tl.load(top_p + row), blocks, BLOCKS, PIVOTS
        )
        tl.store(ends + index, low)
        tl.store(ends + size + index, high)
        tl.store(ends + 2 * size + index, count)
        tl.store(ends + 3 * size + index, lowest)
        tl.store(aims + index, reached)
        tl.store(aims + size + index, target)


@triton.jit
def load_tile(near, first, count, limits, row, weighed, TILE: tl.constexpr, MASKS: tl.constexpr):
    """Collected tokens `first` and on -> (ids, keys, float64 weights, or ones if they are not weighed): LOWEST and
    0 behind the last one, and of what lies below the limits. limits: (key, last id that has it); row: (source,
    words, held, best, temperature)."""
    at = first + tl.arange(0, TILE)
    listed = at < count
    ids = tl.load(near + at, mask=listed, other=0, cache_modifier=".cg")
    scaled = over_temperature(load_scores(row[0], row[1], row[2], ids, listed, MASKS), row[3], row[4])
    key = ordered(scaled, listed)
    above = listed & ((key > limits[0]) | ((key == limits[0]) & (ids <= limits[1])))
    weight = weight_of(tl.where(weighed, scaled, 0.0), above)
    return ids, tl.where(above, key, LOWEST), weight


@triton.jit
def find_cut(
    near, count, limits, row, weighed, share, target, low, high, reached, TILE: tl.constexpr, MASKS: tl.constexpr
):  # fmt: skip
    """New limits: the greatest key from `low` to below `high` that tokens of at least `target` reach, by number
    or weight, and the last id that is kept of those that have it. share: if positive, the target is so much of
    all that is within the limits. reached: what reaches `high`."""
    ids, key, weight = load_tile(near, 0, count, limits, row, weighed, TILE, MASKS)
    if share > 0.0:
        total = tl.sum(weight)
        for first in range(TILE, count, TILE):
            ids, other, more = load_tile(near, first, count, limits, row, weighed, TILE, MASKS)
            total += tl.sum(more)
        target = share * total
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        found = tl.sum(tl.where(key >= middle, weight, 0.0))
        for first in range(TILE, count, TILE):
            ids, other, more = load_tile(near, first, count, limits, row, weighed, TILE, MASKS)
            found += tl.sum(tl.where(other >= middle, more, 0.0))
        enough = found >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, reached, found)
    # One is kept if those before it, that it equals or that are above the cut, are less than the target.
    bits = low ^ ((low >> 31) & 0x7FFFFFFF)
    each = tl.where(weighed, tl.exp(bits.to(tl.float32, bitcast=True).to(tl.float64)), 1.0)
    take = tl.minimum(tl.maximum(tl.ceil((target - reached) / each), 1.0), 1e9).to(tl.int32)
    bound = -1
    seen = 0
    for first in range(0, count, TILE):
        ids, other, more = load_tile(near, first, count, limits, row, False, TILE, MASKS)
        equal = (other == low).to(tl.int32)
        place = seen + tl.cumsum(equal, 0)
        bound = tl.maximum(bound, tl.max(tl.where((equal > 0) & (place <= take), ids, -1)))
        seen += tl.sum(equal)
    return low, bound


@triton.jit(do_not_specialize=("width", "blocks"))
def collect_kernel(
    found, near, ends, aims, rows, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr,
    PIVOTS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the tokens of one block of one row among which its cut is. near: [f, V] int32, by id, as far as
    there are any."""
    index = tl.program_id(0) // blocks
    row = tl.load(rows + index)
    block = tl.program_id(0) % blocks
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    best, _lead = row_best(keys, spots, row, blocks, BLOCKS)
    heat = tl.load(temperature + row)
    size = tl.num_programs(0) // blocks
    low, lowest = tl.load(ends + index), tl.load(ends + 3 * size + index)
    other = tl.arange(0, BLOCKS)
    counts = found + (index * blocks + other) * PIVOTS + lowest
    before = tl.sum(tl.load(counts, mask=other < block, other=0))
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    scaled = over_temperature(load_scores(source, words, held, column, valid, MASKS), best, heat)
    reaches = ordered(scaled, valid) >= low
    place = before + tl.cumsum(reaches.to(tl.int32), 0) - 1
    tl.store(near + index.to(tl.int64) * width + place, column, mask=reaches)


@triton.jit(do_not_specialize=("width", "blocks"))
def cut_kernel(
    found, near, ends, aims, rows, keys, spots, cuts, bounds, temperature, top_k, top_p, min_p,
    logits, stride, copies, edit_slots, left, words, mask_slots, width, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EDITS: tl.constexpr, MASKS: tl.constexpr,
    PIVOTS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the cut of one row, by top_k and then by top_p among what that keeps."""
    index = tl.program_id(0)
    row = tl.load(rows + index)
    source = row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK, EDITS)
    words, held = row_mask(words, mask_slots, row, width, MASKS)
    best, _lead = row_best(keys, spots, row, blocks, BLOCKS)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    size = tl.num_programs(0)
    cut, high, count = tl.load(ends + index), tl.load(ends + size + index), tl.load(ends + 2 * size + index)
    reached, target = tl.load(aims + index), tl.load(aims + size + index)
    near += index.to(tl.int64) * width
    given = (source, words, held, best, heat)
    bound = 0x7FFFFFFF
    share = tl.zeros([], tl.float64)
    for weighed in range(2):
        if tl.where(weighed == 0, k > 0, p < 1.0):
            aim = tl.where(weighed == 0, k.to(tl.float64), target)
            cut, bound = find_cut(
                near, count, (cut, bound), given, weighed == 1, share, aim, cut, high, reached, TILE, MASKS
            )
            high, share = 1, p
            reached = tl.zeros([], tl.float64)
    tl.store(cuts + row, cut)
    tl.store(bounds + row, bound)
