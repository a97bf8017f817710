# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Scores of the lightning indexer.

A tile of BK keys is the left operand of the product and one query's heads the right one: keys fill the 64 or 128
rows that wgmma and tcgen05 want, and the sum over heads stays within a few threads. Keys in pages and gathered
keys X
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.gpu.indexer import GatheredKeys, IndexQuery, groups_of
from weft.kernels.layouts import SCALE_BYTES, RowLayout, keys_fp4, keys_fp8
from weft.kernels.triton.index_gather import gather
from weft.kernels.triton.index_query import query
from weft.kernels.triton.index_tiles import load_keys, load_query, scores

__all__ = ["aot", "gather", "paged", "query", "ragged"]

BK = 128
# Each number of tokens, and pages or gathered keys, is a binary of its own: were products and sums contracted,
# each compilation would decide anew which ones.
SAME_BITS = {"enable_fp_fusion": False}


@triton.jit
def store_scores(out, token, width, column, score, count):
    """-inf where a column is not visible."""
    score = tl.where(column < count, score, float("-inf"))
    tl.store(out + tl.cast(token, tl.int64) * width + column, score, mask=column < width)


@triton.jit
def fill(out, token, width, first, tiles, BK: tl.constexpr, TILES: tl.constexpr):
    """-inf into the tiles of a chunk behind the first `tiles`."""
    for i in range(tiles, TILES):
        column = first + i * BK + tl.arange(0, BK)
        store_scores(out, token, width, column, tl.zeros((BK,), tl.float32), 0)


@triton.jit
def one_token(
    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, token,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr, FP4: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A chunk of one row: the query stays, keys stream."""
    heads, more_heads, weight = load_query(q, q_scales, weights, token, N, BN, DIM, BD, GROUPS, FP4)
    owner = tl.load(owners + token)
    count = tl.load(visible + token)
    tiles = tl.minimum(tl.maximum(tl.cdiv(count - first, BK), 0), TILES)
    for i in range(0, tiles):
        column = first + i * BK + tl.arange(0, BK)
        keys, more_keys, scale = load_keys(
            codes, scales, tables, P, owner, column, column < count, PAGED, PAGE, DATA_PAGE, SCALE_PAGE,
            SCALES_AT, DIM, BD, GROUPS, FP4, BK,
        )  # fmt: skip
        score = scores(keys, more_keys, scale, heads, more_heads, weight, FP4)
        store_scores(out, token, width, column, score, count)
    fill(out, token, width, first, tiles, BK, TILES)


@triton.jit
def some_tokens(
    out, q, q_scales, weights, codes, scales, tables, P, owner, visible, width, first, token, end, most,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr, FP4: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A chunk of rows token..end of one owner, who see up to `most` keys: two tiles stay, queries stream."""
    pairs = tl.minimum(tl.maximum(tl.cdiv(most - first, 2 * BK), 0), TILES // 2)
    for i in range(0, pairs):
        left = first + 2 * i * BK + tl.arange(0, BK)
        right = left + BK
        keys, more_keys, scale = load_keys(
            codes, scales, tables, P, owner, left, left < most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, DIM,
            BD, GROUPS, FP4, BK,
        )  # fmt: skip
        next_keys, more_next, next_scale = load_keys(
            codes, scales, tables, P, owner, right, right < most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT,
            DIM, BD, GROUPS, FP4, BK,
        )  # fmt: skip
        for t in range(token, end):
            heads, more_heads, weight = load_query(q, q_scales, weights, t, N, BN, DIM, BD, GROUPS, FP4)
            count = tl.load(visible + t)
            score = scores(keys, more_keys, scale, heads, more_heads, weight, FP4)
            store_scores(out, t, width, left, score, count)
            score = scores(next_keys, more_next, next_scale, heads, more_heads, weight, FP4)
            store_scores(out, t, width, right, score, count)
    for t in range(token, end):
        fill(out, t, width, first, 2 * pairs, BK, TILES)


# Specialised for no value of what changes from step to step, so that serving compiles nothing.
@triton.jit(do_not_specialize=("P", "T", "width", "chunks"))
def logits_kernel(
    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, T, width, chunks,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr, FP4: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens and TILES * BK columns of out [T, width].

    owners: [T] sequence of a token (PAGED) or its first gathered row. Codes, scales: the elements of key_places.
    """
    first = (tl.program_id(0) % chunks) * (TILES * BK)
    token = (tl.program_id(0) // chunks) * ROWS
    if ROWS == 1:
        one_token(
            out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, token, PAGED, PAGE,
            DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, BD, GROUPS, FP4, BK, TILES,
        )  # fmt: skip
    else:
        tokens = token + tl.arange(0, ROWS)
        owner = tl.load(owners + token)
        owned = tl.load(owners + tokens, mask=tokens < T, other=owner)
        most = tl.max(tl.load(visible + tokens, mask=tokens < T, other=0), 0)
        end = tl.minimum(token + ROWS, T)
        if tl.max((owned != owner).to(tl.int32), 0) == 0:
            some_tokens(
                out, q, q_scales, weights, codes, scales, tables, P, owner, visible, width, first, token, end,
                most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, BD, GROUPS, FP4, BK, TILES,
            )  # fmt: skip
        else:
            for t in range(token, end):
                one_token(
                    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, t, PAGED,
                    PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, BD, GROUPS, FP4, BK, TILES,
                )  # fmt: skip


# About two programs for each multiprocessor of a large GPU. A constant, so that what is launched is known ahead.
_PROGRAMS = 264


def schedule(tokens: int, sequences: int, width: int) -> tuple[int, int]:
    """(tokens, tiles) of a program. They change no bit, only how often a query and a key are read.

    Enough programs for every multiprocessor come first, then long chunks, so that queries are read seldom; tokens
    are put together where many belong to one sequence.
    """
    rows = 8 if tokens >= 8 * sequences else 1
    programs = triton.cdiv(tokens, rows) * triton.cdiv(width, BK)
    tiles = 2
    while tiles < 16 and programs >= 2 * tiles * _PROGRAMS:
        tiles *= 2
    return rows, tiles


def _launch(
    query: IndexQuery, keys: dict[str, Any], owners: Tensor, visible: Tensor, out: Tensor, sequences: int
) -> None:
    config = _config(query.codes.shape[1], query.dim, query.scales is not None)
    tokens, width = out.shape
    rows, tiles = schedule(tokens, sequences, width)
    chunks = triton.cdiv(width, BK * tiles)
    scales = query.weights if query.scales is None else query.scales
    logits_kernel[(chunks * triton.cdiv(tokens, rows),)](
        out, query.codes, scales, query.weights, owners=owners, visible=visible, T=tokens, width=width,
        chunks=chunks, **keys, **config, TILES=tiles, ROWS=rows, num_warps=_warps(config), num_stages=3,
        **SAME_BITS,
    )  # fmt: skip


def _warps(config: dict[str, Any]) -> int:
    """fp4 keys are unpacked in registers, which takes those of twice the threads."""
    return 8 if config["FP4"] else 4


def _config(heads: int, dim: int, fp4: bool) -> dict[str, int | bool]:
    """Tiles of at least 16 heads and 32 channels, as matrix instructions want."""
    return {
        "N": heads,
        "BN": max(16, triton.next_power_of_2(heads)),
        "DIM": dim,
        "BD": max(32, triton.next_power_of_2(dim)),
        "GROUPS": groups_of(dim) if fp4 else 1,
        "FP4": fp4,
        "BK": BK,
    }


def pool_arguments(keys: Paged, tables: Tensor) -> dict[str, Any]:
    """A pool as elements: codes and scales of their own types, both from the pool's first byte on."""
    fp4 = keys.layout.codes == "e2m1"
    return {
        "codes": keys.bytes if fp4 else keys.bytes.view(torch.float8_e4m3fn),
        "scales": keys.bytes if fp4 else keys.bytes.view(torch.float32),
        "tables": tables,
        "P": tables.shape[1],
        **page_config(keys.layout),
    }


def page_config(layout: RowLayout) -> dict[str, int | bool]:
    """Where a page has what, in elements."""
    size = SCALE_BYTES[layout.scales]
    assert layout.page_bytes % size == 0 and layout.scales_at % size == 0
    return {
        "PAGED": True,
        "PAGE": layout.page,
        "DATA_PAGE": layout.page_bytes,
        "SCALE_PAGE": layout.page_bytes // size,
        "SCALES_AT": layout.scales_at // size,
    }


def paged(query: IndexQuery, keys: Paged, tables: Tensor, sequence: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits`."""
    _launch(query, pool_arguments(keys, tables), sequence, visible, out, tables.shape[0])


GATHERED = {"PAGED": False, "PAGE": 1, "DATA_PAGE": 0, "SCALE_PAGE": 0, "SCALES_AT": 0}


def gathered_arguments(keys: GatheredKeys, start: Tensor) -> dict[str, Any]:
    """Gathered keys as the kernel's arguments; start stands in for tables, which are not read."""
    return {"codes": keys.codes, "scales": keys.scales, "tables": start, "P": 0, **GATHERED}


def ragged(query: IndexQuery, keys: GatheredKeys, start: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits_ragged`. That is for prefill, so neighbours are taken to share their keys."""
    _launch(query, gathered_arguments(keys, start), start, visible, out, 1)


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes, 64 heads of 128 channels, pages of 64 keys; and the smallest that products must be padded
    for."""
    paged = (keys_fp8(64, 128), keys_fp4(64, 128))
    cases = [
        logits_case(f"{name} paged", logits_kernel, layout, rows)
        for layout, name in zip(paged, ("fp8", "fp4"), strict=True)
        for rows in (1, 8)
    ]
    small = [
        logits_case(f"{layout.codes} of 16 channels", logits_kernel, layout, 8, 4, 16)
        for layout in (keys_fp8(16, 16), keys_fp4(16, 16))
    ]
    return (*cases, logits_case("fp8 ragged", logits_kernel, None, 8), *small)


def logits_case(
    name: str, kernel: Any, layout: RowLayout | None, rows: int, heads: int = 64, dim: int = 128
) -> AotCase:
    """layout: of the pool; None for gathered fp8 keys."""
    fp4 = layout is not None and layout.codes == "e2m1"
    code, scale = ("*u8", "*u8") if fp4 else ("*fp8e4nv", "*fp32")
    kinds = {"out": "*fp32", "q": code, "q_scales": scale, "weights": "*fp32", "codes": code, "scales": scale}
    kinds |= dict.fromkeys(("tables", "owners", "visible"), "*i32")
    kinds |= dict.fromkeys(("P", "T", "width", "chunks"), "i32")
    config = _config(heads, dim, fp4)
    constants = {**(page_config(layout) if layout else GATHERED), **config, "TILES": 4, "ROWS": rows}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    product = "f16" if fp4 else "f8f6f4"
    expect = {"sm90": ("HGMMA" if fp4 else "QGMMA",), "sm100": (rf"tcgen05\.mma.*kind::{product}",)}
    name = f"index_logits {name}, {rows} row{'s' if rows > 1 else ''}"
    return AotCase(
        name, kernel, signature, constants, warps=_warps(config), stages=3, expect=expect, options=SAME_BITS
    )
