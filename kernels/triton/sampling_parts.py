"""What the kernels that draw tokens share: a row's scores, its noise, what filters keep, and the last program.

A row is cut into blocks of BLOCK columns, one program each. What blocks find is merged in their order, by every
program of the next launch or by the one that arrives last, so that a row's tokens and sums depend on it alone.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: SIM102 -- one condition of a compiled kernel and one of its data are two ifs

from __future__ import annotations

import triton
import triton.language as tl

from weft.kernels.triton.topk import ordered

LOWEST = tl.constexpr(-0x80000000)
NONE = tl.constexpr(0x7FFFFFFF)  # behind every column
_LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
# SplitMix64 (Steele, Lea and Flood, 2014), as signed integers.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_LOW_34 = tl.constexpr((1 << 34) - 1)
_LOW_37 = tl.constexpr((1 << 37) - 1)
_LOW_33 = tl.constexpr((1 << 33) - 1)
_LOW_52 = tl.constexpr((1 << 52) - 1)


@triton.jit
def row_source(logits, stride, copies, edit_slots, left, row, blocks, BLOCK: tl.constexpr, EDITS: tl.constexpr):
    """Where the row's scores are: in its edited copy if it has one, and anything in it is left."""
    source = logits + row.to(tl.int64) * stride
    if EDITS:
        slot = tl.load(edit_slots + row)
        if slot >= 0:
            if tl.load(left + slot) > 0:
                source = copies + slot.to(tl.int64) * (blocks * BLOCK)
    return source


@triton.jit
def row_mask(words, mask_slots, row, width, MASKS: tl.constexpr):
    """(the row's words, -1 if it has none)."""
    held = -1
    if MASKS:
        held = tl.load(mask_slots + row)
        words += tl.maximum(held, 0).to(tl.int64) * tl.cdiv(width, 32)
    return words, held


@triton.jit
def is_allowed(words, held, column, valid):
    asked = valid & (held + tl.zeros_like(column) >= 0)
    word = tl.load(words + (column >> 5), mask=asked, other=-1)
    return ((word >> (column & 31)) & 1) != 0


@triton.jit
def load_scores(source, words, held, column, valid, MASKS: tl.constexpr):
    """float32; -inf where the mask allows nothing or nothing is valid."""
    x = tl.load(source + column, mask=valid, other=float("-inf"))
    if MASKS:
        x = tl.where(is_allowed(words, held, column, valid), x, float("-inf"))
    return x


@triton.jit
def row_best(keys, spots, row, blocks, BLOCKS: tl.constexpr):
    """(the best score, finite; the lowest id that has it)."""
    at = tl.arange(0, BLOCKS)
    key = tl.load(keys + row * blocks + at, mask=at < blocks, other=LOWEST, cache_modifier=".cg")
    spot = tl.load(spots + row * blocks + at, mask=at < blocks, other=NONE, cache_modifier=".cg")
    top = tl.max(key)
    best = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.maximum(best, _LEAST), tl.min(tl.where(key == top, spot, NONE))


@triton.jit
def over_temperature(x, best, temperature):
    """Differences to the best, so that dividing by next to nothing leaves it at 0 and the others at -inf."""
    difference = x - best
    return tl.div_rn(difference, tl.zeros_like(difference) + temperature)


@triton.jit
def weight_of(scaled, valid):
    """float64."""
    return tl.where(valid, tl.exp(scaled.to(tl.float64)), 0.0)


@triton.jit
def is_kept(scaled, column, valid, row, top_k, top_p, min_p, cuts, bounds, FILTERS: tl.constexpr):
    """What the row's filters keep. cuts: the least key that top_k and top_p keep; bounds: the last id among
    those that have it."""
    kept = valid
    if FILTERS:
        if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0):
            key = ordered(scaled, valid)
            cut = tl.load(cuts + row)
            kept = kept & ((key > cut) | ((key == cut) & (column <= tl.load(bounds + row))))
    least = tl.load(min_p + row)
    if least > 0.0:
        kept = kept & (weight_of(scaled, valid) >= least)
    return kept


@triton.jit
def noise_bits(key, column):
    """52 random bits of each column, int64."""
    x = key + (column.to(tl.int64) + 1) * _GOLDEN
    x = (x ^ ((x >> 30) & _LOW_34)) * _MIX_1
    x = (x ^ ((x >> 27) & _LOW_37)) * _MIX_2
    x = x ^ ((x >> 31) & _LOW_33)
    return (x >> 12) & _LOW_52


@triton.jit
def uniform(bits):
    """Between 0 and 1, float64, neither of the two."""
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def gumbel(bits):
    return -tl.log(-tl.log(uniform(bits)))


@triton.jit
def gumbel_limit(bits):
    """float32, above `gumbel` by at most 1 where that is positive: -log(1 - v) is at least v + v^2 / 2, and a
    hundredth is more than float32 and its logarithm are off by."""
    v = ((bits ^ _LOW_52).to(tl.float32) + 0.5) * 2.220446049250313e-16
    return 0.01 - tl.log(v + 0.5 * v * v)


@triton.jit
def arrives_last(counter, count):
    """Whether all other programs of the row have stored what they found; then the counter is 0 again."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last
