# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The k best scores of each row as pool rows, exact, with no atomics and no sorting.

A row of up to SLAB columns is read once into the registers of one program. Scores become integers of the same
order; bisection between the least and the greatest finds a bound that exactly k of them reach, or, where equal
scores lie across the cut, the score that some but not all of are taken. A running count of what is taken gives the
lower entries the last places and every choice its place, so that the entries come out ascending.

Longer rows are cut into slabs that each give their own k best entries, ascending; a second launch picks from
those. Whatever is among the row's k best is among its slab's, and candidates stand in the order of entries, so the
result is the same. Such rows move 3 * k / SLAB more bytes than reading them once, and other wide ones twice the
result's: it is written as entries first.

What is taken is a set that the scores define, whatever way the bound was found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase

SLAB = 16384
# Candidates that the second launch holds: 262,144 columns at k = 1024, 524,288 at k = 512.
CANDIDATES = 16384
LINE = tl.constexpr(128)
_LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def ordered(x, valid):
    """float32 -> int32 of the same order; -0 equals 0, and what is not valid lies below everything."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(valid, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)


@triton.jit
def choose_best(keys, valid, count, k: tl.constexpr):
    """Which of keys [B / LINE, LINE], of which `count` > k are valid, are the k best, and the place of each.

    Lines lie within warps, so that the running count of one takes no barriers.
    """
    low = tl.min(tl.where(valid, keys, 0x7FFFFFFF))
    high = tl.max(keys) + 1
    reach_low = count
    reach_high = 0
    # The mean, rounded down, without a sum that may not fit.
    middle = (low & high) + ((low ^ high) >> 1)
    while (reach_low > k) & (middle > low):
        reach = tl.sum((keys >= middle).to(tl.int32))
        enough = reach >= k
        low = tl.where(enough, middle, low)
        reach_low = tl.where(enough, reach, reach_low)
        high = tl.where(enough, high, middle)
        reach_high = tl.where(enough, reach_high, reach)
        middle = (low & high) + ((low ^ high) >> 1)
    exact = reach_low == k
    above = keys >= tl.where(exact, low, high)
    equal = keys == low
    left = tl.where(exact, 0, k - reach_high)
    # Both counts in one scan, each including the entry's own: B is at most 2^14.
    mark = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    line = tl.sum(mark, 1)
    reached = tl.cumsum(mark, 1) + (tl.cumsum(line, 0) - line)[:, None]
    equals = reached >> 16
    return above | (equal & (equals <= left)), (reached & 0xFFFF) + tl.minimum(equals, left) - 1


@triton.jit
def columns(BLOCK: tl.constexpr, LINE: tl.constexpr):
    """[BLOCK / LINE, LINE] int32, counting up."""
    return tl.arange(0, BLOCK // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]


@triton.jit
def load_scores(logits, entry, valid, count, VECTOR: tl.constexpr):
    """Scores of the first `count` entries. A row has a multiple of VECTOR columns, so up to VECTOR - 1 behind the
    last entry exist; reading them too keeps loads whole."""
    return tl.load(logits + entry, mask=entry < tl.cdiv(count, VECTOR) * VECTOR, other=0.0)


@triton.jit
def store_rows(out, place, entry, chosen, table, base, PAGE: tl.constexpr):
    """Translate entries to pool rows."""
    number = tl.load(table + entry // PAGE, mask=chosen, other=0)
    tl.store(out + place, base + number * PAGE + entry % PAGE, mask=chosen)


@triton.jit
def translate(out, entries, table, base, PAGE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, VIA: tl.constexpr):
    """out holds K entries, or, VIA, where in `entries` they are: replace them by pool rows. For wide tiles, where
    columns that are not chosen would cost the instructions of a translation each."""
    tl.debug_barrier()
    for first in range(0, K, BK):
        i = first + tl.arange(0, BK)
        entry = tl.load(out + i, mask=i < K, other=0)
        if VIA:
            entry = tl.load(entries + entry, mask=i < K, other=0)
        number = tl.load(table + entry // PAGE, mask=i < K, other=0)
        tl.store(out + i, base + number * PAGE + entry % PAGE, mask=i < K)


@triton.jit
def store_all(out, count, table, base, PAGE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """All `count` <= K entries, then -1."""
    for first in range(0, K, BK):
        entry = first + tl.arange(0, BK)
        number = tl.load(table + entry // PAGE, mask=entry < count, other=0)
        row = tl.where(entry < count, base + number * PAGE + entry % PAGE, -1)
        tl.store(out + entry, row, mask=entry < K)


# Specialised for no value of what changes from step to step, so that serving compiles nothing.
@triton.jit(do_not_specialize=("out_stride", "column", "P", "base"))
def rows_kernel(
    out, out_stride, column, logits, stride, visible, tables, P, sequence, base, PAGE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: one row of at most BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + token)
    table = tables + tl.load(sequence + token) * P
    out += token * out_stride + column
    if count <= K:
        store_all(out, count, table, base, PAGE, K, BK)
    else:
        entry = columns(BLOCK, LINE)
        valid = entry < count
        score = load_scores(logits + token * stride, entry, valid, count, VECTOR)
        chosen, place = choose_best(ordered(score, valid), valid, count, K)
        if BLOCK < 16 * K:
            store_rows(out, place, entry, chosen, table, base, PAGE)
        else:
            tl.store(out + place, entry, mask=chosen)
            translate(out, entry, table, base, PAGE, K, BK, False)


@triton.jit(do_not_specialize=("slabs",))
def slabs_kernel(
    entries, logits, stride, visible, slabs, K: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: one slab of one row. entries: [T, slabs, K] int32; as many as the slab has are written."""
    slab = tl.program_id(0) % slabs
    token = (tl.program_id(0) // slabs).to(tl.int64)
    whole = tl.load(visible + token)
    first = slab * BLOCK
    count = tl.minimum(whole - first, BLOCK)
    entries += (token * slabs + slab) * K
    if whole > K:
        if count > K:
            entry = columns(BLOCK, LINE)
            valid = entry < count
            score = load_scores(logits + token * stride + first, entry, valid, count, VECTOR)
            chosen, place = choose_best(ordered(score, valid), valid, count, K)
            tl.store(entries + place, first + entry, mask=chosen)
        else:
            for i in range(0, count, BK):
                entry = i + tl.arange(0, BK)
                tl.store(entries + entry, first + entry, mask=entry < count)


@triton.jit(do_not_specialize=("out_stride", "column", "P", "base", "slabs"))
def merge_kernel(
    out, out_stride, column, entries, logits, stride, visible, tables, P, sequence, base, slabs,
    PAGE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SLAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the candidates of one row, slabs * K of them, at most BLOCK."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + token)
    table = tables + tl.load(sequence + token) * P
    out += token * out_stride + column
    if count <= K:
        store_all(out, count, table, base, PAGE, K, BK)
    else:
        candidate = columns(BLOCK, LINE)
        slab = candidate // K
        valid = (slab < slabs) & (candidate - slab * K < count - slab * SLAB)
        entries += token * slabs * K
        entry = tl.load(entries + candidate, mask=valid, other=0)
        keys = ordered(tl.load(logits + token * stride + entry, mask=valid, other=0.0), valid)
        candidates = tl.sum(valid.to(tl.int32))
        chosen, place = choose_best(keys, valid, candidates, K)
        if BLOCK < 8 * K:
            entry = tl.load(entries + candidate, mask=chosen, other=0)
            store_rows(out, place, entry, chosen, table, base, PAGE)
        else:
            tl.store(out + place, candidate, mask=chosen)
            translate(out, entries, table, base, PAGE, K, BK, True)


def config(width: int, k: int) -> tuple[int, int, int]:
    """(slabs, columns a program holds, candidates the second launch holds) of rows of `width` columns."""
    if width <= SLAB:
        return 1, max(256, triton.next_power_of_2(width)), 0
    slabs = triton.cdiv(width, SLAB)
    return slabs, SLAB, max(256, triton.next_power_of_2(slabs * k))


def _warps(block: int) -> int:
    """16 or, in the widest, 32 values a thread."""
    return min(16, max(4, block // 512))


def top_k_rows(
    logits: Tensor,
    visible: Tensor,
    k: int,
    tables: Tensor,
    sequence: Tensor,
    page: int,
    base: int,
    out: Tensor,
    column: int,
) -> None:
    """As the wrapper of this name. Rows of more than SLAB columns take 4 * k bytes of scratch a slab."""
    tokens, width = logits.shape
    slabs, block, candidates = config(width, k)
    target = (out, out.stride(0), column)
    where = (visible, tables, tables.shape[1], sequence, base)
    sizes = {"K": k, "BK": min(1024, max(16, triton.next_power_of_2(k)))}
    row = {"BLOCK": block, "VECTOR": 4 if width % 4 == 0 else 1, "num_warps": _warps(block)}
    if slabs == 1:
        rows_kernel[(tokens,)](*target, logits, logits.stride(0), *where, PAGE=page, **sizes, **row)
        return
    assert candidates <= CANDIDATES, (width, k)
    entries = torch.empty(tokens, slabs, k, dtype=torch.int32, device=out.device)
    slabs_kernel[(tokens * slabs,)](entries, logits, logits.stride(0), visible, slabs, **sizes, **row)
    held = {"SLAB": SLAB, "BLOCK": candidates, "num_warps": _warps(candidates)}
    merge_kernel[(tokens,)](*target, entries, logits, logits.stride(0), *where, slabs, PAGE=page, **sizes, **held)


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes: k = 512, rows in pages of 64; candidates of V4-Pro, k = 1024, at a million tokens."""
    target = {"out": "*i32", "out_stride": "i32", "column": "i32"}
    where = {"visible": "*i32", "tables": "*i32", "P": "i32", "sequence": "*i32", "base": "i32"}
    row = {"logits": "*fp32", "stride": "i32"}
    scratch = {"entries": "*i32"}
    whole = target | row | where
    slab = scratch | row | {"visible": "*i32", "slabs": "i32"}
    merge = target | scratch | row | where | {"slabs": "i32"}
    sizes = {"K": 512, "BK": 512}
    pro = {"PAGE": 64, "K": 1024, "BK": 1024, "SLAB": SLAB, "BLOCK": CANDIDATES}
    return (
        *(
            _case(f"topk of {width}", rows_kernel, whole, {"PAGE": 64, **sizes, "BLOCK": width, "VECTOR": 4})
            for width in (2048, 8192, SLAB)
        ),
        _case("topk of slabs", slabs_kernel, slab, {**sizes, "BLOCK": SLAB, "VECTOR": 4}),
        _case("topk of candidates", merge_kernel, merge, {"PAGE": 64, **sizes, "SLAB": SLAB, "BLOCK": 8192}),
        _case("topk of candidates, k 1024", merge_kernel, merge, pro),
    )


def _case(name: str, kernel: object, arguments: dict[str, str], constants: dict[str, int]) -> AotCase:
    """A few registers of the widest tile are spilled while the result is written, none in the search."""
    aligned = (*(a for a, kind in arguments.items() if kind[0] == "*"), *({"stride"} & arguments.keys()))
    signature = arguments | dict.fromkeys(constants, "constexpr")
    warps, spills = _warps(constants["BLOCK"]), 64 if constants["BLOCK"] == SLAB else 0
    return AotCase(name, kernel, signature, constants, warps=warps, aligned=aligned, spills=spills)
