"""Scores of the experts, the best of them, and their weights, in one launch.

Experts are the rows of a product whose columns are tokens; K is cut into constant spans. Few tokens: a program has
one tile of experts and one span, so that every SM reads a part of the gate, and leaves its sums in a workspace.
Many: it goes through the spans, adding in the same order. The last program of a tile of tokens to arrive, found by
a counter, adds what the spans left, first to last, and chooses."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import check
from weft.kernels.gpu.weights import LOCKS, FloatWeight
from weft.kernels.triton.topk import ordered

# Below 64 rows every architecture multiplies by the same instruction, whatever the number of columns.
_EXPERTS = 32
_WARPS = 4
# Spans are added in groups of four, and the groups then: so a program may have a span, a group, or all of them.
_GROUP = 4
_MANY = 512
_LINE = 128
_SLOTS = 32
_LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def _product(x, x_stride, gate, e, t, first, tokens, E: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr):
    """Products of experts e [BM] and tokens t [BN] over SPAN channels."""
    k = first + tl.arange(0, SPAN)
    rows = tl.load(gate + e[:, None] * D + k[None, :], mask=(e < E)[:, None] & (k < D)[None, :], other=0.0)
    columns = x + t[:, None] * x_stride + k[None, :]
    columns = tl.load(columns, mask=(t < tokens)[:, None] & (k < D)[None, :], other=0.0)
    if (x.dtype.element_ty == tl.bfloat16) & (gate.dtype.element_ty == tl.bfloat16):
        return tl.dot(rows, tl.trans(columns))
    else:
        return tl.dot(rows.to(tl.float32), tl.trans(columns.to(tl.float32)), input_precision="ieee")


@triton.jit
def _sums(
    x,
    x_stride,
    gate,
    e,
    t,
    part,
    tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The products of one of PARTS shares of the spans: one span, or spans in groups, or all groups."""
    if PARTS == SPANS:
        return _product(x, x_stride, gate, e, t, part * SPAN, tokens, E, D, SPAN)
    else:
        sums = tl.zeros([e.shape[0], t.shape[0]], tl.float32)
        group = tl.zeros([e.shape[0], t.shape[0]], tl.float32)
        PER: tl.constexpr = SPANS if PARTS == 1 else GROUP
        for span in tl.range(part * PER, min(part * PER + PER, SPANS), num_stages=2):
            opens = span % GROUP == 0
            sums += tl.where(opens, group, 0.0)
            product = _product(x, x_stride, gate, e, t, span * SPAN, tokens, E, D, SPAN)
            # Not an addition, of which the compiler would make the product's accumulator: other bits.
            group = tl.fma(product, 1.0, tl.where(opens, 0.0, group))
        return sums + group


@triton.jit
def sqrt_softplus(x):
    """The root of log(1 + exp(x)). log(1 + e) = 2 artanh(e / (2 + e)), whose argument is 1/3 at most: so its
    series is as accurate near e = 0 as elsewhere."""
    e = tl.exp(-tl.abs(x))
    z = tl.div_rn(e, 2.0 + e)
    s = z * z
    p = tl.fma(s, 1.0 / 17.0, 1.0 / 15.0)
    p = tl.fma(p, s, 1.0 / 13.0)
    p = tl.fma(p, s, 1.0 / 11.0)
    p = tl.fma(p, s, 1.0 / 9.0)
    p = tl.fma(p, s, 1.0 / 7.0)
    p = tl.fma(p, s, 1.0 / 5.0)
    p = tl.fma(p, s, 1.0 / 3.0)
    return tl.sqrt_rn(tl.maximum(x, 0.0) + 2.0 * tl.fma(p * s, z, z))


@triton.jit
def _largest(x):
    """[LINES, R, LINE] -> [1, R, 1]: a row's lines lie in the registers of one warp, where no reduction has
    barriers."""
    return tl.max(tl.max(x, 0), 1)[None, :, None]


@triton.jit
def _best(biased, column, E: tl.constexpr, K: tl.constexpr):
    """Which of the first E columns are among a row's K largest; of equal ones the lower."""
    key = ordered(biased, column < E)
    for _ in range(K):
        top = _largest(key)
        first = -_largest(tl.where(key == top, -column, -0x7FFFFFFF))
        key = tl.where(column == first, _LOWEST, key)
    return (key == _LOWEST) & (column < E)


@triton.jit
def _logits(at, mask, stride, SPANS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """What programs left for the same logits, `stride` apart: added as one program adds spans."""
    PER: tl.constexpr = GROUP if PARTS == SPANS else 1
    logit = tl.zeros(mask.shape, tl.float32)
    for group in tl.static_range((PARTS + PER - 1) // PER):
        total = tl.load(at + group * PER * stride, mask=mask, other=0.0, cache_modifier=".cg")
        for part in tl.static_range(group * PER + 1, min(group * PER + PER, PARTS)):
            total += tl.load(at + part * stride, mask=mask, other=0.0, cache_modifier=".cg")
        logit += total
    return logit


@triton.jit
def _choose(
    logit,
    column,
    bias,
    table,
    ids,
    experts,
    weights,
    t,
    tokens,
    scaling,
    E: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    HASHED: tl.constexpr,
):
    """Experts and weights of tokens t [1, R, 1] from logits [LINES, R, LINE]."""
    score = sqrt_softplus(logit)
    valid = t < tokens
    if HASHED:
        # Every lane loads its row's experts: to hand them out would take barriers.
        same = tl.zeros([1, 1, column.shape[2]], tl.int32)
        number = tl.maximum(tl.load(ids + (t + same), mask=valid & (same == 0), other=0), 0).to(tl.int64)
        chosen = column < 0
        for i in tl.static_range(K):
            chosen = chosen | (column == tl.load(table + number * K + i))
    else:
        # As the logits are loaded; t < 0 never is, but without a term of the row the hint would be dropped.
        shift = tl.max_contiguous(bias + (column + (t < 0).to(tl.int32)), [1, t.shape[1], column.shape[2]])
        shift = tl.load(shift, mask=(column < E) & valid, other=0.0)
        chosen = _best(score + shift, column, E, K)
    # As many slots as a warp has lanes: a row's lie in the warp of its scores, so nothing moves between warps.
    slot = tl.arange(0, SLOTS)[None, None, :]
    number_of = tl.zeros([1, t.shape[1], SLOTS], tl.int32) + E
    share = tl.zeros([1, t.shape[1], SLOTS], tl.float32)
    total = tl.zeros([1, t.shape[1], SLOTS], tl.float32)
    last = tl.zeros([1, t.shape[1], column.shape[2]], tl.int32) - 1
    for i in range(K):
        expert = -_largest(tl.where(chosen & (column > last), -column, -0x7FFFFFFF))
        # No score is negative, so the one that is asked for is the largest of it and zeros, as integers too.
        bits = tl.where(column == expert, score.to(tl.int32, bitcast=True), 0)
        value = _largest(bits).to(tl.float32, bitcast=True)
        total += value
        share = tl.where(slot == i, value, share)
        number_of = tl.where(slot == i, expert, number_of)
        last = tl.broadcast_to(expert, last.shape)
    share = tl.div_rn(share, total) * scaling
    at = t * (K + 1) + slot
    tl.store(weights + at, tl.where(slot == K, 1.0, share), mask=valid & (slot <= K))
    tl.store(experts + at, number_of, mask=valid & (slot <= K))


@triton.jit(do_not_specialize=("tokens",))
def _route(
    x,
    x_stride,
    gate,
    bias,
    table,
    ids,
    partial,
    locks,
    experts,
    weights,
    tokens,
    scaling,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    SLOTS: tl.constexpr,
    HASHED: tl.constexpr,
):
    """Program (e, p, t): tile e of experts, tile t of tokens, and the p-th of PARTS shares of the spans."""
    tile = tl.program_id(2)
    part = tl.program_id(1)
    e = tl.program_id(0) * BM + tl.arange(0, BM)
    t = tile.to(tl.int64) * BN + tl.arange(0, BN)
    sums = _sums(x, x_stride, gate, e, t, part, tokens, E, D, SPAN, SPANS, PARTS, GROUP)
    at = partial + (part.to(tl.int64) * tokens + t)[None, :] * E + e[:, None]
    tl.store(at, sums, mask=(e < E)[:, None] & (t < tokens)[None, :])
    tl.debug_barrier()
    arrived = tl.atomic_add(locks + tile, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) * PARTS - 1:
        tl.store(locks + tile, 0)
        line = tl.arange(0, LINES)[:, None, None] * LINE
        column = line + tl.arange(0, LINE)[None, None, :]
        for first in range(0, BN, ROWS):
            if tile * BN + first < tokens:
                row = (tile.to(tl.int64) * BN + first + tl.arange(0, ROWS))[None, :, None]
                mask = (row < tokens) & (column < E)
                # Rows do not lie side by side: the hint only puts them before lines in the order that threads are
                # dealt in, so that a row has a warp of its own.
                left = tl.max_contiguous(partial + row * E + column, [1, ROWS, LINE])
                logit = _logits(left, mask, tokens.to(tl.int64) * E, SPANS, PARTS, GROUP)
                _choose(
                    logit, column, bias, table, ids, experts, weights, row, tokens, scaling, E, K, SLOTS, HASHED
                )


def route(
    x: Tensor,
    gate: FloatWeight,
    bias: Tensor | None,
    table: Tensor | None,
    ids: Tensor,
    k: int,
    scaling: float,
    chosen: Tensor,
    weights: Tensor,
) -> None:
    """See `weft.kernels.gpu.routing.route`; chosen, weights: what it returns."""
    tokens, dim = x.shape
    exact = x.dtype == gate.weight.dtype == torch.bfloat16
    constants = _constants(tokens, gate.shape[0], dim, k, exact=exact, hashed=table is not None)
    grid = triton.cdiv(gate.shape[0], _EXPERTS), constants["PARTS"], triton.cdiv(tokens, constants["BN"])
    check(grid[2] <= LOCKS and k < _SLOTS, "tokens, k", tokens, k)
    partial = torch.empty(constants["PARTS"], tokens, gate.shape[0], dtype=torch.float32, device=x.device)
    _route[grid](
        x, x.stride(0), gate.weight, bias, table, ids, partial, gate.locks, chosen, weights, tokens, scaling,
        **constants, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _constants(tokens: int, experts: int, dim: int, k: int, *, exact: bool, hashed: bool) -> dict[str, int]:
    """SPAN by the types and the width alone; what follows from the number of tokens leaves a row's bits alone."""
    span = (256 if dim <= 4096 else 512) if exact else 64
    spans = triton.cdiv(dim, span)
    lines = triton.next_power_of_2(triton.cdiv(experts, _LINE))
    return {
        "E": experts,
        "D": dim,
        "K": k,
        "BM": _EXPERTS,
        "BN": 16 if tokens <= _MANY or not exact else 64 if dim <= 4096 else 32,
        "SPAN": span,
        "SPANS": spans,
        "PARTS": spans if tokens <= 4 else triton.cdiv(spans, _GROUP) if tokens <= _MANY else 1,
        "GROUP": _GROUP,
        # A warp each where there are few; where there are more, as many as registers hold scores of.
        "ROWS": 4 if tokens <= 4 or lines > 2 else 8,
        "LINES": lines,
        "LINE": _LINE,
        "SLOTS": _SLOTS,
        "HASHED": hashed,
    }


def aot() -> tuple[AotCase, ...]:
    """V4-Flash and V4-Pro: one token, a small batch, and many; a layer with a table."""
    cases = []
    for model, experts, dim in (("flash", 256, 4096), ("pro", 384, 7168)):
        for name, tokens, hashed in (
            ("one", 1, False),
            ("some", 32, False),
            ("many", 4096, False),
            ("hashed", 1, True),
        ):
            constants = _constants(tokens, experts, dim, 6, exact=True, hashed=hashed)
            cases.append(_case(f"route_{model}_{name}", constants))
    return tuple(cases)


def _case(name: str, constants: dict[str, int]) -> AotCase:
    signature = {"x": "*bf16", "x_stride": "i32", "gate": "*bf16", "bias": "*fp32", "table": "*i32", "ids": "*i32"}
    signature |= {"partial": "*fp32", "locks": "*i32", "experts": "*i32", "weights": "*fp32"}
    aligned = tuple(signature)
    signature |= {"tokens": "i32", "scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
    expected = (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16",
        r"(ld\.global(\.\w+)*\.v4)|(cp\.async\.cg)",
        r"atom\.global\.gpu\.acq_rel\.add|atom\.acq_rel\.gpu\.global\.add|atom\.global\.acq_rel\.gpu\.add",
    )
    return AotCase(
        name,
        _route,
        signature,
        constants,
        _WARPS,
        expect={"sm90": expected, "sm100": expected},
        aligned=aligned,
        options={"enable_fp_fusion": False},
    )
