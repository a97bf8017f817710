# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Queries of the lightning indexer: RoPE, Hadamard rotation and quantisation of one token's heads per program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.indexer import IndexQuery
from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8
from weft.kernels.triton.common import e2m1_bytes, e4m3_bits, hadamard, load_rotation, quantise, rotate


@triton.jit
def query_kernel(
    codes,
    scales,
    folded,
    q,
    weights,
    cos_sin,
    heads,
    q_stride,
    weights_stride,
    factor,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    HADAMARD: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS heads of a token. codes: [T, n, bytes] uint8; scales: [T, n, GROUPS] of e2m1 only."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = head < heads
    row = token * heads + head
    channel = tl.arange(0, D)
    source = q + token * q_stride + head[:, None] * D + channel[None, :]
    x = tl.load(source, mask=here[:, None], other=0.0).to(tl.float32)
    one = token + tl.arange(0, 1)
    cos, sin = load_rotation(cos_sin, one, one >= 0, D, ROPE, D)
    x = rotate(x, cos, sin)
    if HADAMARD:
        x = hadamard(x)
    weight = tl.load(weights + token * weights_stride + head, mask=here, other=0.0).to(tl.float32) * factor
    scaled, scale = quantise(x, GROUPS, CODES, SCALES, LEAST)
    if CODES == "e2m1":
        half = tl.arange(0, D // 2)
        tl.store(codes + row[:, None] * (D // 2) + half[None, :], e2m1_bytes(scaled), mask=here[:, None])
        group = tl.arange(0, GROUPS)
        tl.store(scales + row[:, None] * GROUPS + group[None, :], scale, mask=here[:, None])
    else:
        tl.store(codes + row[:, None] * D + channel[None, :], e4m3_bits(scaled), mask=here[:, None])
        weight *= tl.reshape(scale, [ROWS])
    tl.store(folded + row, weight, mask=here)


def _config(heads: int, dim: int, rope: int, hadamard: bool, fp4: bool) -> dict[str, Any]:
    """Of keys of the same format. 32 heads of 128 channels are 32 values a thread."""
    layout: RowLayout = (keys_fp4 if fp4 else keys_fp8)(1, dim)
    return {
        "D": dim,
        "ROPE": rope,
        "HADAMARD": hadamard,
        "CODES": layout.codes,
        "SCALES": layout.scales,
        "GROUPS": layout.groups,
        "LEAST": layout.least,
        "ROWS": min(32, triton.next_power_of_2(heads)),
    }


def query(q: Tensor, weights: Tensor, cos_sin: Tensor, hadamard: bool, factor: float, out: IndexQuery) -> None:
    """`index_query`."""
    tokens, heads, dim = q.shape
    config = _config(heads, dim, cos_sin.shape[1], hadamard, out.scales is not None)
    grid = (tokens, triton.cdiv(heads, config["ROWS"]))
    codes = out.codes.view(torch.uint8)
    scales = codes if out.scales is None else out.scales
    numbers = heads, q.stride(0), weights.stride(0), factor
    query_kernel[grid](codes, scales, out.weights, q, weights, cos_sin, *numbers, **config, num_warps=4)


def aot() -> tuple[AotCase, ...]:
    return tuple(_case(kind, fp4) for kind in ("bf16", "fp32") for fp4 in (False, True))


def _case(kind: str, fp4: bool) -> AotCase:
    config = _config(64, 128, 64, True, fp4)
    signature = {
        "codes": "*u8",
        "scales": "*u8",
        "folded": "*fp32",
        "q": f"*{kind}",
        "weights": "*fp32",
        "cos_sin": "*fp32",
        "heads": "i32",
        "q_stride": "i32",
        "weights_stride": "i32",
        "factor": "fp32",
    }
    aligned = (*(name for name, kind in signature.items() if kind.startswith("*")), "q_stride", "weights_stride")
    name = f"index_query {'fp4' if fp4 else 'fp8'} {kind}"
    expect = {} if fp4 else {arch: (r"cvt\.rn\.satfinite\.e4m3x2",) for arch in ("sm90", "sm100")}
    signature |= dict.fromkeys(config, "constexpr")
    return AotCase(name, query_kernel, signature, config, expect=expect, aligned=aligned)
