"""Norm and RoPE of queries, and of the KV row with its quantisation and store, in one launch."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import RowLayout, kv_fp8
from weft.kernels.triton.common import layout_constants, load_rotation, rms_scale, rotate, store_rows

# Never chosen by the number of tokens: the order of a head's sum follows from them.
_HEADS = 4
_WARPS = 4


@triton.jit
def _norm_rope_store(
    q,
    kv,
    weight,
    cos_sin,
    rows,
    pool,
    out,
    q_stride,
    kv_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    CODED: tl.constexpr,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Program (t, 0): the KV row of token t. Program (t, 1 + b): heads b * HEADS and on."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) - 1
    column = tl.arange(0, COLS)[None, :]
    one = tl.zeros([1], tl.int64)
    cos, sin = load_rotation(cos_sin, one + token, one == 0, D, ROPE, COLS)
    if block < 0:
        row = tl.load(rows + token + one)
        x = tl.load(kv + token * kv_stride + column, mask=column < D, other=0.0).to(tl.float32)
        scaled = x * rms_scale(x, eps, D) * tl.load(weight + column, mask=column < D, other=0.0)
        x = rotate(scaled, cos, sin)
        store_rows(x, row, pool, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST)
    else:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        at = head * D + column
        mask = (head < H) & (column < D)
        heads = tl.load(q + token * q_stride + at, mask=mask, other=0.0).to(tl.float32)
        heads = rotate(heads * rms_scale(heads, eps, D), cos, sin)
        tl.store(out + token * (H * D) + at, heads.to(out.dtype.element_ty), mask=mask)


def norm_rope_store(
    q: Tensor, kv: Tensor, kv_weight: Tensor, cos_sin: Tensor, rows: Tensor, pool: Paged, eps: float, out: Tensor
) -> None:
    """See `weft.kernels.gpu.heads.norm_rope_store`; out: what it returns."""
    tokens, heads, dim = q.shape
    constants = _constants(heads, dim, cos_sin.shape[1], pool.layout)
    grid = (tokens, 1 + triton.cdiv(heads, _HEADS))
    strides = q.stride(0), kv.stride(0)
    _norm_rope_store[grid](
        q, kv, kv_weight, cos_sin, rows, pool.bytes, out, *strides, eps, **constants, num_warps=_WARPS
    )


def _constants(heads: int, dim: int, rope: int, layout: RowLayout) -> dict[str, object]:
    columns = triton.next_power_of_2(dim)
    return {"H": heads, "D": dim, "ROPE": rope, "COLS": columns, "HEADS": _HEADS, **layout_constants(layout)}


def aot() -> tuple[AotCase, ...]:
    """V4-Flash and V4-Pro, bfloat16."""
    signature = {
        "q": "*bf16",
        "kv": "*bf16",
        "weight": "*fp32",
        "cos_sin": "*fp32",
        "rows": "*i32",
        "pool": "*u8",
        "out": "*bf16",
        "q_stride": "i32",
        "kv_stride": "i32",
        "eps": "fp32",
    }
    aligned = ("q", "kv", "weight", "cos_sin", "rows", "pool", "out", "q_stride", "kv_stride")
    cases = []
    for model, heads in (("flash", 64), ("pro", 128)):
        constants = _constants(heads, 512, 64, kv_fp8(64, 448, 64))
        full = signature | dict.fromkeys(constants, "constexpr")
        wide = (r"ld\.global\.v4", r"st\.global\.v4", r"cvt\.rn\.satfinite\.e4m3x2")
        cases.append(
            AotCase(
                f"norm_rope_store_{model}",
                _norm_rope_store,
                full,
                constants,
                warps=_WARPS,
                expect={"sm90": wide, "sm100": wide},
                aligned=aligned,
            )
        )
    return tuple(cases)
