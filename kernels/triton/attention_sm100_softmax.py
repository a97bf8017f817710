# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""The softmax partition of `attention_sm100_kernel`: weights of each tile, rescaling of the sums, results."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import fence_async_shared, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)
# A head's base may lie below its largest logit by so many powers of two before its sums are rescaled.
SLACK = gl.constexpr(8.0)
KEYS = gl.constexpr(64)
HEADS = gl.constexpr(64)
DIM = gl.constexpr(512)


@gluon.jit
def soften(logits, sums, weights, factors, barriers, index, begin, end, scale, tiles):
    """Logits -> weights, tile by tile. Returns each head's base and the sum of its weights, both in powers of 2.

    One thread pair holds a head's logits, so that maxima and sums need one shuffle. The sums are rescaled only
    for a head whose logits outgrow its base by SLACK; the decision is each head's own.
    """
    logits_full, weights_full, summed = barriers
    layout: gl.constexpr = logits.index(0).get_reg_layout()
    by_head: gl.constexpr = gl.SliceLayout(1, layout)
    top = gl.full([HEADS], float("-inf"), gl.float32, by_head)
    total = gl.full([HEADS], 0.0, gl.float32, by_head)
    for tile in range(tiles):
        column = begin + KEYS * tile + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        present = gl.load(index + column, mask=column < end, other=-1) >= 0
        mbarrier.wait(logits_full.index(tile % 2), tile // 2 % 2)
        logit = logits.index(tile % 2).load() * scale
        logit = gl.where(gl.expand_dims(present, 0), logit, float("-inf"))
        highest = gl.max(logit, 1)
        outgrown = highest > top + SLACK
        higher = gl.where(outgrown, highest, top)
        base = gl.where(higher == float("-inf"), 0.0, higher)
        decay = gl.exp2(top - base)
        weight = gl.exp2(logit - gl.expand_dims(base, 1)).to(weights.dtype)
        total = total * decay + gl.sum(weight.to(gl.float32), 1)
        top = higher
        rescale = gl.max(outgrown.to(gl.int32), 0)
        if tile > 0:
            mbarrier.wait(summed, (tile - 1) % 2)
            if rescale > 0:
                factors.store(decay)
                for part in range(DIM // 128):
                    for half in gl.static_range(2):
                        piece = sums.index(part).slice(32 * half, 32)
                        piece.store(piece.load() * gl.expand_dims(half_of(factors, half, piece), 0))
        weights.store(weight)
        fence_async_shared()
        mbarrier.arrive(weights_full)
    if tiles > 0:
        mbarrier.wait(summed, (tiles - 1) % 2)
    return top, total


@gluon.jit
def finish(softening, results, sink, at, first, heads, single, tiles):
    """The first partition: softmax, then this split's result, or the whole row's if it has one split."""
    logits, sums, weights, factors, barriers, index, begin, end, scale = softening
    out, parts, tops, totals = results
    top, total = soften(logits, sums, weights, factors, barriers, index, begin, end, scale, tiles)
    head = gl.arange(0, HEADS, gl.SliceLayout(1, logits.index(0).get_reg_layout()))
    inside = first + head < heads
    if single:
        bias = gl.load(sink + first + head, mask=inside, other=0.0) * LOG2E
        highest = gl.maximum(top, bias)
        base = gl.where(highest == float("-inf"), 0.0, highest)
        share = gl.exp2(top - base)
        factors.store(gl.where(total > 0, share / (total * share + gl.exp2(bias - base)), 0.0))
        write(sums, factors, out, at, heads - first)
    elif tiles > 0:
        gl.store(tops + at + head, top, mask=inside)
        gl.store(totals + at + head, total, mask=inside)
        factors.store(gl.where(total > 0, 1.0, 0.0))
        write(sums, factors, parts, at, heads - first)


@gluon.jit
def half_of(factors, half: gl.constexpr, piece):
    """A factor for each of the 32 heads that are columns of `piece`. Half at a time: fewer registers."""
    return factors.slice(32 * half, 32).load(gl.SliceLayout(0, piece.get_reg_layout()))


@gluon.jit
def write(sums, factors, target, at, heads):
    """Sums times a head's factor. A factor of 0 hides what the sums of no tile at all may hold."""
    target += at.to(gl.int64) * DIM
    for part in range(DIM // 128):
        for half in gl.static_range(2):
            write_half(sums.index(part).slice(32 * half, 32), factors, target + part * 128, half, heads)


@gluon.jit
def write_half(piece, factors, target, half: gl.constexpr, heads):
    layout: gl.constexpr = piece.get_reg_layout()
    head = 32 * half + gl.arange(0, 32, gl.SliceLayout(0, layout))
    offset = gl.expand_dims(head * DIM, 0) + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, layout)), 1)
    factor = gl.expand_dims(half_of(factors, half, piece), 0)
    value = gl.where(factor > 0, piece.load() * factor, 0.0)
    gl.store(target + offset, value.to(target.dtype.element_ty), mask=gl.expand_dims(head < heads, 0))
