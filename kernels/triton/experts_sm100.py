"""Experts in FP4 on Blackwell, whose tensor cores read e2m1 codes and a power of two for every 32 of them.

Weights go from memory to the product as they are stored: packed along K, their scales beside them
(tcgen05.mma, kind mxf8f6f4, block_scale). They are the left operand, 128 rows high; tokens are e4m3, their scale
of 128 columns given four times, as the instruction wants one for 32. The sum over K stays in tensor memory, so its
bits are not those of the other kernels, but depend on nothing but the pair either. The shared expert's weights, in
e4m3, take the same instruction. Interpreted from Triton 3.9 on; compiled, but never run on such a GPU.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.expert_weights import Experts, Fp4Experts
from weft.kernels.gpu.experts import ExpertTiles
from weft.kernels.triton.common import quantise
from weft.kernels.triton.experts import SAME_BITS, arguments, find, take
from weft.kernels.triton.experts_parts import swiglu

_ROWS = 128


@triton.jit
def scaled_tokens(x, x_scales, x_pitch, row, here, chunk, K: tl.constexpr, CODED: tl.constexpr):
    """128 columns of rows `row` of x: e4m3 [BN, 128] and E8M0 scales [BN, 4], all four the same."""
    k = chunk * 128 + tl.arange(0, 128)
    at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    tokens = tl.load(at, mask=here[:, None] & (k < K)[None, :], other=0.0)
    if CODED:
        scale_at = x_scales + tl.cast(chunk, tl.int64) * x_pitch + row[:, None] + tl.arange(0, 4)[None, :] * 0
        return tokens, tl.load(scale_at, mask=here[:, None], other=0)
    tokens = tokens.to(tl.float32)
    scaled, byte = quantise(tokens, 1, "e4m3", "e8m0", 1e-4)
    return scaled.to(tl.float8e4nv), tl.broadcast_to(byte, [tokens.shape[0], 4])


@triton.jit
def scaled_sums(
    w, w_scales, row, x, x_scales, x_pitch, xrow, here, N: tl.constexpr, K: tl.constexpr, FP4: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One expert's rows `row` [BM] times tokens -> [BM, BN] float32. w: e2m1 [N, K/2] and w_scales [N, K/32], or
    e4m3 [N, K] and w_scales [chunks, N]."""
    PACK: tl.constexpr = 2 if FP4 else 1
    total = tl.zeros([BM, BN], tl.float32)
    for chunk in range(0, tl.cdiv(K, 128)):
        byte = chunk * (128 // PACK) + tl.arange(0, 128 // PACK)
        mask = (row < N)[:, None] & (byte < K // PACK)[None, :]
        group = chunk * 4 + tl.arange(0, 4)
        if FP4:
            codes = tl.load(w + row[:, None] * (K // 2) + byte[None, :], mask=mask, other=0)
            known = (row < N)[:, None] & (group < K // 32)[None, :]
            scale = tl.load(w_scales + row[:, None] * (K // 32) + group[None, :], mask=known, other=0)
        else:
            codes = tl.load(w + row[:, None] * K + byte[None, :], mask=mask, other=0.0)
            scale = tl.load(w_scales + chunk * N + row, mask=row < N, other=0)
            scale = tl.broadcast_to(scale[:, None], [BM, 4])
        tokens, token_scale = scaled_tokens(x, x_scales, x_pitch, xrow, here, chunk, K, CODED)
        if FP4:
            total = tl.dot_scaled(codes, scale, "e2m1", tokens.T, token_scale, "e4m3", total)
        else:
            total = tl.dot_scaled(codes, scale, "e4m3", tokens.T, token_scale, "e4m3", total)
    return total


@triton.jit
def scaled_product(
    out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, expert, tile, pair, here, limit,
    PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, GATED: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As `experts.product`."""
    row = tile * BM + tl.arange(0, BM)
    xrow = pair // PLACES if GATED else pair
    number = tl.cast(expert, tl.int64)
    total = tl.zeros([BM, BN], tl.float32)
    if expert == E:
        total = scaled_sums(
            shared, shared_scales, row, x, x_scales, x_pitch, xrow, here, N, K, False, CODED, BM, BN,
        )  # fmt: skip
    else:
        codes, scales = w + number * (N * (K // 2)), w_scales + number * (N * (K // 32))
        total = scaled_sums(codes, scales, row, x, x_scales, x_pitch, xrow, here, N, K, True, CODED, BM, BN)
    if GATED:
        total = swiglu(total, tl.load(weights + pair, mask=here, other=0.0), limit)
        row = tile * (BM // 2) + tl.arange(0, BM // 2)
    WIDTH: tl.constexpr = N // 2 if GATED else N
    at = out + pair.to(tl.int64)[None, :] * WIDTH + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[None, :] & (row < WIDTH)[:, None])


@triton.jit(do_not_specialize=("T", "x_pitch"))
def scaled_kernel(
    out, x, x_scales, x_pitch, ids, order, table, weights, w, w_scales, shared, shared_scales, T, limit,
    PLACES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, GATED: tl.constexpr,
    CODED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SORTED: tl.constexpr, BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, slot) as `experts.decode_kernel`, or (tile of rows, tile of pairs) if SORTED."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BN)
    if SORTED:
        count = tl.load(table + slot * 3 + 2)
        if count > 0:
            expert = tl.load(table + slot * 3)
            mine = tl.load(order + tl.load(table + slot * 3 + 1) + column, mask=column < count, other=0)
            scaled_product(
                out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, expert, tile, mine,
                column < count, limit, PLACES, N, K, E, GATED, CODED, BM, BN,
            )  # fmt: skip
    else:
        all_tokens = tl.cdiv(T, BN)
        if slot < all_tokens:
            token = slot * BN + column
            scaled_product(
                out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, E, tile,
                token * PLACES + PLACES - 1, token < T, limit, PLACES, N, K, E, GATED, CODED, BM, BN,
            )  # fmt: skip
        else:
            expert, count = find(ids, T, slot - all_tokens, PLACES, BY_PAIR, PAIRS)
            last = -1
            for first in range(0, count, BN):
                mine, last = take(ids, expert, last, count - first, T, PLACES, PAIRS, BN)
                place = first + column
                scaled_product(
                    out, x, x_scales, x_pitch, weights, w, w_scales, shared, shared_scales, expert, tile, mine,
                    place < count, limit, PLACES, N, K, E, GATED, CODED, BM, BN,
                )  # fmt: skip


def run(
    out: Tensor, x: Tensor, x_scales: Tensor | None, ids: Tensor, weights: Tensor | None, experts: Experts,
    limit: float, tiles: ExpertTiles | None, *, gated: bool,
) -> None:  # fmt: skip
    """As `experts.run`, for `Fp4Experts`."""
    assert isinstance(experts, Fp4Experts), type(experts)
    constants, arrays = arguments(experts, ids, gated)
    scales = arrays["w_scales"] if x_scales is None else x_scales
    assert x_scales is None or x_scales.stride(0) == 1, x_scales.stride()
    constants = {name: constants[name] for name in ("PLACES", "N", "K", "E", "GATED")}
    tokens, places = ids.shape
    routed = tokens * (places - 1)
    width = 16 if tokens <= 128 else 32
    slots = triton.cdiv(tokens, width) + min(routed, constants["E"])
    order = table = ids
    if tiles is not None:
        width, slots, order, table = tiles.size, len(tiles.table), tiles.order, tiles.table
    scaled_kernel[(triton.cdiv(constants["N"], _ROWS), slots)](
        out, x, scales, scales.stride(1), ids, order, table, out if weights is None else weights, **arrays,
        T=tokens, limit=limit, BM=_ROWS, BN=width, CODED=x_scales is not None, SORTED=tiles is not None,
        BY_PAIR=routed <= constants["E"], PAIRS=max(16, triton.next_power_of_2(routed)), **constants,
        num_warps=4, num_stages=4, **SAME_BITS,
    )  # fmt: skip


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes."""
    return tuple(_case(gated, tile) for gated in (True, False) for tile in (None, 64))


def _case(gated: bool, tile: int | None) -> AotCase:
    constants: dict[str, Any] = {"PLACES": 7, "N": 4096, "K": 4096 if gated else 2048, "E": 256, "GATED": gated}
    constants |= {
        "BM": _ROWS,
        "BN": tile or 16,
        "CODED": tile is not None,
        "SORTED": tile is not None,
        "BY_PAIR": True,
        "PAIRS": 64,
    }
    kinds = dict.fromkeys(("ids", "order", "table"), "*i32") | {
        "weights": "*fp32",
        "T": "i32",
        "x_pitch": "i32",
        "limit": "fp32",
    }
    kinds |= {"out": "*bf16", "x": "*fp8e4nv" if tile else "*bf16", "x_scales": "*u8"}
    kinds |= dict.fromkeys(("w", "w_scales", "shared_scales"), "*u8")
    kinds |= {"shared": "*fp8e4nv"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds[argument] for argument in scaled_kernel.arg_names}
    expect = {"sm100": (r"tcgen05\.mma\S*kind::mxf8f6f4\S*block_scale",)}
    name = f"experts fp4 block_scale, {'w13' if gated else 'w2'}, " + (
        "8 tokens" if tile is None else f"tiles of {tile}"
    )
    return AotCase(
        name, scaled_kernel, signature, constants, stages=4, archs=("sm100",), expect=expect, options=SAME_BITS
    )
