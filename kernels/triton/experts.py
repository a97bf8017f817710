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
from weft.kernels.gpu.expert_weights import Experts, FloatExperts, Fp4Experts, Fp8Experts
from weft.kernels.gpu.experts import ExpertTiles
from weft.kernels.triton.experts_parts import float_sums, fp4_sums, fp8_sums, swiglu

# Each number of tokens is a binary of its own; contraction would be decided anew in each.
SAME_BITS = {"enable_fp_fusion": False}


@triton.jit
def sums(
    w, w_scales, shared, shared_scales, expert, row, x, x_scales, x_pitch, xrow, here,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr, CODED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
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
        return fp8_sums(codes, scales, row, x, x_scales, x_pitch, xrow, here, N, K, CODED, BM, BN)
    else:
        total = tl.zeros([BM, BN], tl.float32)
        if expert == E:
            total = fp8_sums(shared, shared_scales, row, x, x_scales, x_pitch, xrow, here, N, K, CODED, BM, BN)
        else:
            codes = w + number * (N * (K // 2))
            scales = w_scales + number * (N * (K // 32))
            total = fp4_sums(codes, scales, row, x, x_scales, x_pitch, xrow, here, N, K, CODED, BM, BN)
        return total


@triton.jit
def product(
    out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, expert, tile, pair, here,
    limit, PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of the expert's rows for pairs `pair` [BN], of which `here` are any, into out [pairs, *]."""
    row = tile * BM + tl.arange(0, BM)
    xrow = pair // PLACES if GATED else pair
    total = sums(
        w, w_scales, shared, shared_scales, expert, row, x, x_scales, x_pitch, xrow, here, N, K,
        E, FORMAT, CODED, BM, BN,
    )  # fmt: skip
    if GATED:
        weight = tl.load(weights + pair, mask=here, other=0.0)
        total = swiglu(total, weight, limit)
        row = tile * (BM // 2) + tl.arange(0, BM // 2)
    WIDTH: tl.constexpr = N // 2 if GATED else N
    at = out + pair.to(tl.int64)[None, :] * WIDTH + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[None, :] & (row < WIDTH)[:, None])


@triton.jit
def own_pairs(ids, expert, T, PLACES: tl.constexpr, PAIRS: tl.constexpr):
    """Routed pairs [PAIRS], and which of them are the expert's."""
    q = tl.arange(0, PAIRS)
    pair = q // (PLACES - 1) * PLACES + q % (PLACES - 1)
    return pair, tl.load(ids + pair, mask=q < T * (PLACES - 1), other=-1) == expert


@triton.jit
def find(ids, T, g, PLACES: tl.constexpr, BY_PAIR: tl.constexpr, PAIRS: tl.constexpr):
    """Slot g among the routed pairs: its expert, and how many pairs are the expert's; 0: nothing to do."""
    expert = g
    first = 0
    if BY_PAIR:
        first = g // (PLACES - 1) * PLACES + g % (PLACES - 1)
        expert = tl.load(ids + first)
    pair, own = own_pairs(ids, expert, T, PLACES, PAIRS)
    count = tl.sum(own.to(tl.int32), 0)
    if BY_PAIR:
        # Only the first pair that names an expert does the work; none does if it is none.
        earlier = tl.max((own & (pair < first)).to(tl.int32), 0)
        count = tl.where((earlier > 0) | (expert < 0), 0, count)
    return expert, count


@triton.jit
def take(ids, expert, last, count, T, PLACES: tl.constexpr, PAIRS: tl.constexpr, BN: tl.constexpr):
    """The expert's next `count` pairs behind pair `last`, BN at most -> [BN], and the last of them. One by one: a
    table of all pairs against BN places would not fit in registers."""
    pair, own = own_pairs(ids, expert, T, PLACES, PAIRS)
    left = tl.where(own & (pair > last), pair, 0x7FFFFFFF)
    column = tl.arange(0, BN)
    mine = tl.zeros([BN], tl.int32)
    for j in range(0, tl.minimum(count, BN)):
        last = tl.min(left, 0)
        left = tl.where(left == last, 0x7FFFFFFF, left)
        mine = tl.where(column == j, last, mine)
    return mine, last


@triton.jit(do_not_specialize=("T", "x_pitch"))
def decode_kernel(
    out, x, x_scales, x_pitch, ids, weights, w, w_scales, shared, shared_scales, T, limit,
    PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BY_PAIR: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, slot): first a slot for every BN tokens of the shared expert, then the routed ones: a
    pair each (BY_PAIR), or an expert each."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    all_tokens = tl.cdiv(T, BN)
    if slot < all_tokens:
        token = slot * BN + tl.arange(0, BN)
        product(
            out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, E, tile,
            token * PLACES + PLACES - 1, token < T, limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN,
        )  # fmt: skip
    else:
        expert, count = find(ids, T, slot - all_tokens, PLACES, BY_PAIR, PAIRS)
        last = -1
        for first in range(0, count, BN):
            mine, last = take(ids, expert, last, count - first, T, PLACES, PAIRS, BN)
            product(
                out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, expert, tile,
                mine, first + tl.arange(0, BN) < count, limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN,
            )  # fmt: skip


@triton.jit(do_not_specialize=("x_pitch",))
def tiles_kernel(
    out, x, x_scales, x_pitch, order, table, weights, w, w_scales, shared, shared_scales, limit,
    PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of sorted pairs)."""
    entry = table + tl.program_id(1) * 3
    count = tl.load(entry + 2)
    if count > 0:
        column = tl.arange(0, BN)
        pair = tl.load(order + tl.load(entry + 1) + column, mask=column < count, other=0)
        product(
            out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, tl.load(entry),
            tl.program_id(0), pair, column < count, limit, PLACES, N, K, E, FORMAT, GATED, CODED, BM, BN,
        )  # fmt: skip


def config(format: str, tokens: int, tile: int | None) -> dict[str, int]:
    """Tile heights and widths, warps, stages, registers. Few tokens: small tiles, for enough programs and little
    work on tokens; 128 registers, for four programs on a multiprocessor."""
    if tile is not None and format == "fp4":
        return {"BM": 64, "BN": tile, "num_warps": 4, "num_stages": 3}
    if tile is not None:
        return {"BM": 128, "BN": tile, "num_warps": 4 if tile <= 32 else 8, "num_stages": 3}
    least = 16 if format == "float" else 8
    if format == "fp4":
        return {"BM": 64, "BN": least if tokens <= 8 else 16, "num_warps": 8, "num_stages": 4}
    if tokens <= 8:
        return {"BM": 64, "BN": least, "num_warps": 4, "num_stages": 5, "maxnreg": 128}
    return {"BM": 128 if tokens > 64 else 64, "BN": 32 if tokens > 128 else 16, "num_warps": 4, "num_stages": 4}


def run(
    out: Tensor, x: Tensor, x_scales: Tensor | None, ids: Tensor, weights: Tensor | None, experts: Experts,
    limit: float, tiles: ExpertTiles | None, *, gated: bool,
) -> None:  # fmt: skip
    """One product: w13's with swiglu if gated, x [T, D] -> out [T * (k + 1), I], else w2's, x [T * (k + 1), I] ->
    out [T * (k + 1), D]. x: e4m3 codes where x_scales are given."""
    constants, arrays = arguments(experts, ids, gated)
    weights = out if weights is None else weights  # not read
    tokens, places = ids.shape
    how: dict[str, Any] = config(constants["FORMAT"], tokens, tiles.size if tiles else None)
    constants |= {"CODED": x_scales is not None, **how, **SAME_BITS}
    blocks = triton.cdiv(constants["N"], how["BM"])
    scales = arrays["w_scales"] if x_scales is None else x_scales
    assert x_scales is None or x_scales.stride(0) == 1, x_scales.stride()
    pitch = scales.stride(1)
    if tiles is not None:
        grid = (blocks, len(tiles.table))
        tiles_kernel[grid](
            out, x, scales, pitch, tiles.order, tiles.table, weights, **arrays, limit=limit, **constants,
        )  # fmt: skip
        return
    routed = tokens * (places - 1)
    by_pair = routed <= constants["E"]
    grid = (blocks, triton.cdiv(tokens, how["BN"]) + (routed if by_pair else constants["E"]))
    decode_kernel[grid](
        out, x, scales, pitch, ids, weights, **arrays, T=tokens, limit=limit, BY_PAIR=by_pair,
        PAIRS=max(16, triton.next_power_of_2(routed)), **constants,
    )  # fmt: skip


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
    if isinstance(experts, Fp4Experts):
        shared, shared_scales = getattr(experts.shared, name), getattr(experts.shared, name + "_scales")
    return constants, {
        "w": w,
        "w_scales": w_scales,
        "shared": shared,
        "shared_scales": shared_scales,
    }


_FORMATS: dict[type, str] = {
    FloatExperts: "float",
    Fp8Experts: "fp8",
    Fp4Experts: "fp4",
}


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes: decode of 8 tokens, up to 64 and up to 256, and prefill."""
    cases = []
    for format, tile in (("fp8", 128), ("float", 128), ("fp4", 64)):
        for gated in (True, False):
            for tokens in (8, 64, 256):
                cases.append(_case(format, gated, tokens, None))
            cases.append(_case(format, gated, 4096, tile))
    return tuple(cases)


def _case(format: str, gated: bool, tokens: int, tile: int | None) -> AotCase:
    rows, columns = (4096, 4096) if gated else (4096, 2048)
    how = config(format, tokens, tile)
    coded = tile is not None and format != "float"
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
    }
    kernel = decode_kernel if tile is None else tiles_kernel
    if tile is None:
        constants |= {"BY_PAIR": tokens == 8, "PAIRS": {8: 64, 64: 512, 256: 2048}[tokens]}
    codes = {
        "fp8": ("*fp8e4nv", "*u8"),
        "float": ("*bf16", "*bf16"),
        "fp4": ("*u8", "*u8"),
    }
    kinds = dict.fromkeys(("ids", "order", "table"), "*i32") | {
        "weights": "*fp32",
        "T": "i32",
        "x_pitch": "i32",
        "limit": "fp32",
    }
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
    options = {**SAME_BITS, **({"maxnreg": how["maxnreg"]} if "maxnreg" in how else {})}
    return AotCase(
        name, kernel, signature, constants, how["num_warps"], how["num_stages"], expect=expect, options=options
    )
