# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Scores of fp4 indexer keys on Blackwell, whose tensor cores read e2m1 codes and their blocks' powers of two.

A tile of 128 keys is the left operand, one query's heads the right one: both go from memory to the product as they
are stored, scales included (tcgen05.mma, kind mxf4, block_scale), so that nothing is unpacked. Programs are cut as
in `indexer.py`: tokens of one sequence share tiles of keys. Products of codes and scales are exact; what is left
is the order of float32 sums, which is the same for every row. Interpreted from Triton 3.9 on.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.gpu.indexer import GatheredKeys, IndexQuery, groups_of
from weft.kernels.layouts import keys_fp4
from weft.kernels.triton.index_tiles import key_places
from weft.kernels.triton.indexer import (
    BK,
    GATHERED,
    SAME_BITS,
    fill,
    gathered_arguments,
    page_config,
    pool_arguments,
    schedule,
    store_scores,
)


@triton.jit
def load_packed(codes, scales, at, scale_at, here, DIM: tl.constexpr, GROUPS: tl.constexpr):
    """Codes [R, DIM / 2] and biased exponents [R, GROUPS] of keys or heads."""
    tile = tl.load(codes + at[:, None] + tl.arange(0, DIM // 2)[None, :], mask=here[:, None], other=0)
    group = tl.arange(0, GROUPS)
    return tile, tl.load(scales + scale_at[:, None] + group[None, :], mask=here[:, None], other=0)


@triton.jit
def load_heads(
    q, q_scales, weights, token, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """One token's heads, packed, and their weights, 0 for heads it has not."""
    head = tl.arange(0, BN)
    here = head < N
    row = tl.cast(token, tl.int64) * N + head
    heads, scale = load_packed(q, q_scales, row * (DIM // 2), row * GROUPS, here, DIM, GROUPS)
    return heads, scale, tl.load(weights + row, mask=here, other=0.0)


@triton.jit
def load_tile(
    codes, scales, tables, P, owner, column, seen, PAGED: tl.constexpr, PAGE: tl.constexpr,
    DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr, SCALES_AT: tl.constexpr, DIM: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Keys `column` of `owner`, packed."""
    at, scale_at = key_places(
        tables, P, owner, column, seen, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, DIM // 2, GROUPS
    )
    return load_packed(codes, scales, at, scale_at, seen, DIM, GROUPS)


@triton.jit
def scores(keys, scale, heads, head_scale, weight):
    """[BK] scores of a tile of keys for one token."""
    product = tl.dot_scaled(keys, scale, "e2m1", heads.T, head_scale, "e2m1")
    return tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1)


@triton.jit
def one_token(
    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, token,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A chunk of one row: the query stays, keys stream."""
    heads, head_scale, weight = load_heads(q, q_scales, weights, token, N, BN, DIM, GROUPS)
    owner = tl.load(owners + token)
    count = tl.load(visible + token)
    tiles = tl.minimum(tl.maximum(tl.cdiv(count - first, BK), 0), TILES)
    for i in range(0, tiles):
        column = first + i * BK + tl.arange(0, BK)
        keys, scale = load_tile(
            codes, scales, tables, P, owner, column, column < count, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT,
            DIM, GROUPS,
        )  # fmt: skip
        store_scores(out, token, width, column, scores(keys, scale, heads, head_scale, weight), count)
    fill(out, token, width, first, tiles, BK, TILES)


@triton.jit
def some_tokens(
    out, q, q_scales, weights, codes, scales, tables, P, owner, visible, width, first, token, end, most,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A chunk of rows token..end of one owner, who see up to `most` keys: two tiles stay, queries stream."""
    pairs = tl.minimum(tl.maximum(tl.cdiv(most - first, 2 * BK), 0), TILES // 2)
    for i in range(0, pairs):
        left = first + 2 * i * BK + tl.arange(0, BK)
        right = left + BK
        keys, scale = load_tile(
            codes, scales, tables, P, owner, left, left < most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, DIM,
            GROUPS,
        )  # fmt: skip
        next_keys, next_scale = load_tile(
            codes, scales, tables, P, owner, right, right < most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT,
            DIM, GROUPS,
        )  # fmt: skip
        for t in range(token, end):
            heads, head_scale, weight = load_heads(q, q_scales, weights, t, N, BN, DIM, GROUPS)
            count = tl.load(visible + t)
            store_scores(out, t, width, left, scores(keys, scale, heads, head_scale, weight), count)
            store_scores(out, t, width, right, scores(next_keys, next_scale, heads, head_scale, weight), count)
    for t in range(token, end):
        fill(out, t, width, first, 2 * pairs, BK, TILES)


@triton.jit(do_not_specialize=("P", "T", "width", "chunks"))
def fp4_logits_kernel(
    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, T, width, chunks,
    PAGED: tl.constexpr, PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr,
    SCALES_AT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens and TILES * BK columns of out [T, width], as `indexer.logits_kernel`."""
    first = (tl.program_id(0) % chunks) * (TILES * BK)
    token = (tl.program_id(0) // chunks) * ROWS
    if ROWS == 1:
        one_token(
            out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, token, PAGED, PAGE,
            DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, GROUPS, BK, TILES,
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
                most, PAGED, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, GROUPS, BK, TILES,
            )  # fmt: skip
        else:
            for t in range(token, end):
                one_token(
                    out, q, q_scales, weights, codes, scales, tables, P, owners, visible, width, first, t, PAGED,
                    PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, N, BN, DIM, GROUPS, BK, TILES,
                )  # fmt: skip


def _config(heads: int, dim: int) -> dict[str, int]:
    return {
        "N": heads,
        "BN": max(16, triton.next_power_of_2(heads)),
        "DIM": dim,
        "GROUPS": groups_of(dim),
        "BK": BK,
    }


def _launch(
    query: IndexQuery, keys: dict[str, Any], owners: Tensor, visible: Tensor, out: Tensor, sequences: int
) -> None:
    assert query.kind == "e2m1" and query.dim >= 64, (query.kind, query.dim)
    tokens, width = out.shape
    rows, tiles = schedule(tokens, sequences, width)
    chunks = triton.cdiv(width, BK * tiles)
    config = _config(query.codes.shape[1], query.dim)
    fp4_logits_kernel[(chunks * triton.cdiv(tokens, rows),)](
        out, query.codes, query.scales, query.weights, owners=owners, visible=visible, T=tokens, width=width,
        chunks=chunks, **keys, **config, TILES=tiles, ROWS=rows, num_warps=4, num_stages=3, **SAME_BITS,
    )  # fmt: skip


def paged(query: IndexQuery, keys: Paged, tables: Tensor, sequence: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits`."""
    _launch(query, pool_arguments(keys, tables), sequence, visible, out, tables.shape[0])


def ragged(query: IndexQuery, keys: GatheredKeys, start: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits_ragged`."""
    _launch(query, gathered_arguments(keys, start), start, visible, out, 1)


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes."""
    pages = page_config(keys_fp4(64, 128))
    return (
        _case("paged, 1 row", pages, 1),
        _case("paged, 8 rows", pages, 8),
        _case("ragged, 8 rows", GATHERED, 8),
    )


def _case(name: str, place: dict[str, Any], rows: int) -> AotCase:
    constants = {**place, **_config(64, 128), "TILES": 4, "ROWS": rows}
    kinds = dict.fromkeys(("q", "q_scales", "codes", "scales"), "*u8")
    kinds |= dict.fromkeys(("out", "weights"), "*fp32") | dict.fromkeys(("tables", "owners", "visible"), "*i32")
    kinds |= dict.fromkeys(("P", "T", "width", "chunks"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds[argument] for argument in fp4_logits_kernel.arg_names}
    expect = {"sm100": (r"tcgen05\.mma\S*kind::mxf4\S*block_scale",)}
    name = f"index_logits fp4 block_scale {name}"
    return AotCase(
        name, fp4_logits_kernel, signature, constants, stages=3, archs=("sm100",), expect=expect, options=SAME_BITS
    )
