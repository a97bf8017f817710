"""Both products of the experts, each in one launch, w13's with the gated activation in its epilogue.

A program has one tile of weight rows of one expert. Decode: it finds the expert's tokens among all pairs by
itself, so that nothing is permuted; the shared expert's tokens are known to be all. Prefill: `experts_permute`
has sorted the pairs, a program takes one tile of them. A pair's sum is the same either way.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.expert_weights import Experts, FloatExperts, Fp4Experts, Fp8Experts, ShuffledExperts
from weft.kernels.gpu.experts import ExpertTiles
from weft.kernels.triton.experts_parts import float_sums, fp4_sums, fp8_sums, swiglu
from weft.kernels.triton.experts_shuffled import shuffled_sums

# Each number of tokens is a binary of its own; contraction would be decided anew in each.
SAME_BITS = {"enable_fp_fusion": False}


@triton.jit
def sums(
    w, w_scales, shared, shared_scales, expert, row, x, x_scales, xrow, here, N: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, FORMAT: tl.constexpr, CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Rows `row` of `expert` times rows `xrow` of x -> [BM, BN] float32."""
    CHUNKS: tl.constexpr = (K + 127) // 128
    number = tl.cast(expert, tl.int64)
    if FORMAT == "float":
        BK: tl.constexpr = 64 if w.dtype.element_ty == tl.bfloat16 else 32
        return float_sums(w + number * (N * K), row, x, xrow, here, N, K, BM, BN, BK)
    elif FORMAT == "fp8":
        codes = w + number * (N * K)
        scales = w_scales + number * (CHUNKS * N)
        return fp8_sums(codes, scales, row, x, x_scales, xrow, here, N, K, CODED, BM, BN)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        if expert == E:
            total = fp8_sums(shared, shared_scales, row, x, x_scales, xrow, here, N, K, CODED, BM, BN)
        elif FORMAT == "fp4":
            codes = w + number * (N * (K // 2))
            scales = w_scales + number * (N * (K // 32))
            total = fp4_sums(codes, scales, row, x, x_scales, xrow, here, N, K, CODED, BM, BN)
        else:
            ROWS: tl.constexpr = (N + 63) // 64 * 64
            codes = w + number * (ROWS * CHUNKS * 64)
            scales = w_scales + number * (ROWS * CHUNKS)
            total = shuffled_sums(codes, scales, row, x, x_scales, xrow, here, N, K, CODED, BM, BN, ASM)
        return total


@triton.jit
def product(
    out, x, x_scales, weights, w, w_scales, shared, shared_scales, expert, tile, pair, here, limit,
    PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of the expert's rows for pairs `pair` [BN], of which `here` are any, into out [pairs, *]."""
    row = tile * BM + tl.arange(0, BM)
    xrow = pair // PLACES if GATED else pair
    total = sums(
        w,
        w_scales,
        shared,
        shared_scales,
        expert,
        row,
        x,
        x_scales,
        xrow,
        here,
        N,
        K,
        E,
        FORMAT,
        CODED,
        BM,
        BN,
        ASM,
    )
    if GATED:
        weight = tl.load(weights + pair, mask=here, other=0.0)
        total = swiglu(total, weight, limit)
        row = tile * (BM // 2) + tl.arange(0, BM // 2)
    WIDTH: tl.constexpr = N // 2 if GATED else N
    at = out + pair.to(tl.int64)[None, :] * WIDTH + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[None, :] & (row < WIDTH)[:, None])


@triton.jit
def find(ids, T, g, PLACES: tl.constexpr, BY_PAIR: tl.constexpr, PAIRS: tl.constexpr):
    """Slot g among the routed pairs: its expert, the pair numbers [PAIRS], each one's rank among the expert's own
    (-1 if it is not one of them), and how many those are: 0 if there is nothing to do."""
    q = tl.arange(0, PAIRS)
    pair = q // (PLACES - 1) * PLACES + q % (PLACES - 1)
    expert = g
    named = tl.load(ids + pair, mask=q < T * (PLACES - 1), other=-1)
    if BY_PAIR:
        expert = tl.load(ids + g // (PLACES - 1) * PLACES + g % (PLACES - 1))
    own = (named == expert).to(tl.int32)
    count = tl.sum(own, 0)
    if BY_PAIR:
        # Only the first pair that names an expert does the work.
        count = tl.where(tl.sum(tl.where(q < g, own, 0), 0) > 0, 0, count)
    return expert, pair, tl.where(own > 0, tl.cumsum(own, 0) - 1, -1), count


@triton.jit(do_not_specialize=("T",))
def decode_kernel(
    out, x, x_scales, ids, weights, w, w_scales, shared, shared_scales, T, limit, PLACES: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr, GATED: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, slot): first a slot for every BN tokens of the shared expert, then the routed ones: a
    pair each (BY_PAIR), or an expert each."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    all_tokens = tl.cdiv(T, BN)
    if slot < all_tokens:
        token = slot * BN + tl.arange(0, BN)
        product(
            out, x, x_scales, weights, w, w_scales, shared, shared_scales, E, tile, token * PLACES + PLACES - 1,
            token < T, limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN, ASM,
        )  # fmt: skip
    else:
        expert, pair, rank, count = find(ids, T, slot - all_tokens, PLACES, BY_PAIR, PAIRS)
        for first in range(0, count, BN):
            column = first + tl.arange(0, BN)
            mine = tl.sum(tl.where(rank[:, None] == column[None, :], pair[:, None], 0), 0)
            product(
                out, x, x_scales, weights, w, w_scales, shared, shared_scales, expert, tile, mine, column < count,
                limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN, ASM,
            )  # fmt: skip


@triton.jit
def tiles_kernel(
    out, x, x_scales, order, table, weights, w, w_scales, shared, shared_scales, limit, PLACES: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr, GATED: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of sorted pairs)."""
    entry = table + tl.program_id(1) * 3
    count = tl.load(entry + 2)
    if count > 0:
        column = tl.arange(0, BN)
        pair = tl.load(order + tl.load(entry + 1) + column, mask=column < count, other=0)
        product(
            out, x, x_scales, weights, w, w_scales, shared, shared_scales, tl.load(entry), tl.program_id(0), pair,
            column < count, limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN, ASM,
        )  # fmt: skip


def config(rows: int, tokens: int, tile: int | None) -> dict[str, int]:
    """Tile heights, widths and warps: small tiles give few tokens enough programs."""
    if tile is not None:
        return {"BM": 128, "BN": tile, "num_warps": 8 if tile > 32 else 4, "num_stages": 3}
    if tokens <= 8:
        return {"BM": 64, "BN": 16, "num_warps": 4, "num_stages": 5}
    return {"BM": 128, "BN": 16 if tokens <= 128 else 32, "num_warps": 4, "num_stages": 4}


def run(
    out: Tensor, x: Tensor, x_scales: Tensor | None, ids: Tensor, weights: Tensor | None, experts: Experts,
    limit: float, tiles: ExpertTiles | None, *, gated: bool,
) -> None:  # fmt: skip
    """One product: w13's with swiglu if gated, x [T, D] -> out [T * (k + 1), I], else w2's, x [T * (k + 1), I] ->
    out [T * (k + 1), D]. x: e4m3 codes where x_scales are given."""
    constants, arrays = arguments(experts, ids, gated)
    weights = out if weights is None else weights  # not read
    tokens, places = ids.shape
    how: dict[str, Any] = config(constants["N"], tokens, tiles.size if tiles else None)
    constants |= {"CODED": x_scales is not None, **how, **SAME_BITS, "ASM": not _interpreted()}
    blocks = triton.cdiv(constants["N"], how["BM"])
    scales = arrays["w_scales"] if x_scales is None else x_scales
    if tiles is not None:
        grid = (blocks, len(tiles.table))
        tiles_kernel[grid](
            out, x, scales, tiles.order, tiles.table, weights, **arrays, limit=limit, **constants
        )  # fmt: skip
        return
    routed = tokens * (places - 1)
    by_pair = routed <= constants["E"]
    grid = (blocks, triton.cdiv(tokens, how["BN"]) + (routed if by_pair else constants["E"]))
    decode_kernel[grid](
        out, x, scales, ids, weights, **arrays, T=tokens, limit=limit, BY_PAIR=by_pair,
        PAIRS=max(16, triton.next_power_of_2(routed)), **constants,
    )  # fmt: skip


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def arguments(experts: Experts, ids: Tensor, gated: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constants and weights of one of the two products."""
    count, dim, inner = experts.shape
    name = "w13" if gated else "w2"
    w = getattr(experts, name)
    constants = {
        "PLACES": ids.shape[1],
        "N": 2 * inner if gated else dim,
        "K": dim if gated else inner,
        "E": count - 1,
        "GATED": gated,
        "FORMAT": _FORMATS[type(experts)],
    }
    w_scales = w if isinstance(experts, FloatExperts) else getattr(experts, name + "_scales")
    shared, shared_scales = w, w_scales
    if isinstance(experts, Fp4Experts | ShuffledExperts):
        shared, shared_scales = getattr(experts.shared, name), getattr(experts.shared, name + "_scales")
    return constants, {"w": w, "w_scales": w_scales, "shared": shared, "shared_scales": shared_scales}


_FORMATS: dict[type, str] = {
    FloatExperts: "float",
    Fp8Experts: "fp8",
    Fp4Experts: "fp4",
    ShuffledExperts: "shuffled",
}


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes: decode of 8 and of 32 tokens, and prefill."""
    cases = []
    for format in ("fp8", "float", "fp4", "shuffled"):
        for gated in (True, False):
            for tokens in (8, 32) if format != "float" else (8,):
                cases.append(_case(format, gated, tokens, None))
        cases.append(_case(format, True, 4096, 128 if format == "fp8" else 32))
    return tuple(cases)


def _case(format: str, gated: bool, tokens: int, tile: int | None) -> AotCase:
    rows, columns = (4096, 4096) if gated else (4096, 2048)
    how = config(rows, tokens, tile)
    coded = tile is not None and format == "fp8"
    constants = {
        "PLACES": 7,
        "N": rows,
        "K": columns,
        "E": 256,
        "FORMAT": format,
        "GATED": gated,
        "CODED": coded,
        "BM": how["BM"],
        "BN": how["BN"],
        "ASM": True,
    }
    kernel = decode_kernel if tile is None else tiles_kernel
    if tile is None:
        constants |= {"BY_PAIR": True, "PAIRS": 256 if tokens > 8 else 64}
    codes = {
        "fp8": ("*fp8e4nv", "*u8"),
        "float": ("*bf16", "*bf16"),
        "fp4": ("*u8", "*u8"),
        "shuffled": ("*u8", "*i32"),
    }
    kinds = dict.fromkeys(("ids", "order", "table"), "*i32") | {"weights": "*fp32", "T": "i32", "limit": "fp32"}
    kinds |= {"out": "*bf16", "x": "*fp8e4nv" if coded else "*bf16", "x_scales": "*u8"}
    kinds |= dict(zip(("w", "w_scales"), codes[format], strict=True))
    kinds |= dict(zip(("shared", "shared_scales"), codes["float" if format == "float" else "fp8"], strict=True))
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    product = ("HGMMA", "kind::f16") if format == "float" else ("QGMMA", "kind::f8f6f4")
    expect = {"sm90": (product[0],), "sm100": (rf"tcgen05\.mma.*{product[1]}",)}
    name = f"experts {format}, {'w13' if gated else 'w2'}, " + (
        f"{tokens} tokens" if tile is None else f"tiles of {tile}"
    )
    options = {**SAME_BITS}
    return AotCase(
        name, kernel, signature, constants, how["num_warps"], how["num_stages"], expect=expect, options=options
    )
