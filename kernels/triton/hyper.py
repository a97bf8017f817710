"""Hyper-connections in two launches: streams and their products with the mixer, then gates, gather and norm.

The first cuts D into constant blocks, one a program, and takes all streams of a block: it spreads the sublayer's
output, and writes what the block adds to a token's products. Few tokens: one tile of 16 a program, so that every
SM reads a part of fn. Many: a program holds its part of fn in registers and goes through tiles, so that fn is not
read for each. In the second, one program a token adds the blocks' sums, gathers and normalises; others do the
matrices meanwhile, one token a lane: nothing in the launch waits for them."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import interpreting
from weft.kernels.gpu.hyper import HeadMixer, Mixer
from weft.kernels.triton.common import rms_scale
from weft.kernels.triton.hyper_finish import finish
from weft.kernels.triton.hyper_parts import (
    load_mixer,
    load_tile,
    mixer_sums,
    new_streams,
    pieces,
    store_streams,
    store_sums,
)

_TILE = 16
# Channels of a program: then V4-Flash's 4,096 give about as many programs as a GPU has SMs.
_BLOCK = 32
_MIX_WARPS = 4
# Tiles of tokens from which on programs go through several, and how many programs then share a block.
_MANY = 8
_SHARERS = 4


@triton.jit(do_not_specialize=("tokens",))
def _mix(
    h,
    y,
    mix,
    out,
    fn,
    partial,
    tokens,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARERS: tl.constexpr,
):
    """Program (b, i): channels from b * BLOCK on, and tile i of tokens (SHARERS = 0) or every SHARERS-th from
    it."""
    SPLIT: tl.constexpr = h.dtype.element_ty == tl.bfloat16
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    if SHARERS == 0:
        token = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None].to(tl.int64)
        valid = token < tokens
        old, parts, row = load_tile(h, y, mix, token, d, valid & (d < D), valid, D, PARTS)
    # Everything is on its way before anything waits.
    w = load_mixer(fn, d, D, ROWS, COLS)
    if SHARERS == 0:
        n = new_streams(old, parts, row, PARTS)
    w0, w1 = pieces(w[0], SPLIT), pieces(w[1], SPLIT)
    w2, w3 = pieces(w[2], SPLIT), pieces(w[3], SPLIT)
    if SHARERS == 0:
        if PARTS > 0:
            store_streams(out, n, token, d, valid & (d < D), D)
        store_sums(partial, mixer_sums(n, w0, w1, w2, w3, COLS), token, valid, block, BLOCKS, ROWS)
    else:
        for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, TILE), SHARERS, num_stages=3):
            token = (tile * TILE + tl.arange(0, TILE))[:, None].to(tl.int64)
            valid = token < tokens
            old, parts, row = load_tile(h, y, mix, token, d, valid & (d < D), valid, D, PARTS)
            n = new_streams(old, parts, row, PARTS)
            if PARTS > 0:
                store_streams(out, n, token, d, valid & (d < D), D)
            store_sums(partial, mixer_sums(n, w0, w1, w2, w3, COLS), token, valid, block, BLOCKS, ROWS)


@triton.jit(do_not_specialize=("tokens",))
def _post(h, y, mix, out, tokens, D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None].to(tl.int64)
    valid = token < tokens
    old, parts, row = load_tile(h, y, mix, token, d, valid & (d < D), valid, D, PARTS)
    n = new_streams(old, parts, row, PARTS)
    store_streams(out, n, token, d, valid & (d < D), D)


@triton.jit
def _rms_norm(x, stride, weight, eps, out, D: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    row = tl.load(x + token * stride + d, mask=d < D, other=0.0).to(tl.float32)
    scaled = row * rms_scale(row, eps, D) * tl.load(weight + d, mask=d < D, other=0.0)
    tl.store(out + token * D + d, scaled.to(out.dtype.element_ty), mask=d < D)


def hyper_pre(h: Tensor, mixer: Mixer, norm: Tensor, x: Tensor, mix: Tensor) -> None:
    """See `weft.kernels.gpu.hyper.hyper_pre`; x, mix: what it returns."""
    _run(h, None, None, mixer, norm, h, x, mix)


def hyper_post_pre(
    h: Tensor, y: Tensor, mix: Tensor, mixer: Mixer, norm: Tensor, out: Tensor, x: Tensor, new: Tensor
) -> None:
    """See `weft.kernels.gpu.hyper.hyper_post_pre`; out, x, new: what it returns."""
    _run(h, y, mix, mixer, norm, out, x, new)


def hyper_head(h: Tensor, mixer: HeadMixer, norm: Tensor, x: Tensor) -> None:
    """See `weft.kernels.gpu.hyper.hyper_head`; x: what it returns."""
    _run(h, None, None, mixer, norm, h, x, None)


def hyper_post(h: Tensor, y: Tensor, mix: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.hyper.hyper_post`; out: what it returns."""
    tokens, _, dim = h.shape
    grid = triton.cdiv(dim, _BLOCK), triton.cdiv(tokens, _TILE)
    constants = {"D": dim, "PARTS": y.shape[1], "TILE": _TILE, "BLOCK": _BLOCK}
    _post[grid](h, y, mix, out, tokens, **constants, num_warps=_MIX_WARPS, enable_fp_fusion=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `weft.kernels.gpu.hyper.rms_norm`; out: what it returns."""
    tokens, dim = x.shape
    width = triton.next_power_of_2(dim)
    _rms_norm[(tokens,)](
        x, x.stride(0), weight, eps, out, D=dim, WIDTH=width, num_warps=_warps(dim), enable_fp_fusion=False
    )


def _run(
    h: Tensor,
    y: Tensor | None,
    mix: Tensor | None,
    mixer: Mixer | HeadMixer,
    norm: Tensor,
    out: Tensor,
    x: Tensor,
    new: Tensor | None,
) -> None:
    tokens, _, dim = h.shape
    parts = 0 if y is None else y.shape[1]
    first = _mix_constants(tokens, dim, parts, len(mixer.base))
    shape = tokens, first["BLOCKS"], first["COLS"]
    partial = torch.empty(shape, dtype=torch.float32, device=h.device)
    grid = first["BLOCKS"], first["SHARERS"] or triton.cdiv(tokens, _TILE)
    _mix[grid](h, y, mix, out, mixer.fn, partial, tokens, **first, num_warps=_MIX_WARPS, enable_fp_fusion=False)
    iterations = mixer.iterations if isinstance(mixer, Mixer) else 0
    second = _finish_constants(tokens, dim, len(mixer.base), iterations)
    groups = triton.cdiv(tokens, second["GROUP"]) if iterations else 0
    finish[(groups + tokens,)](
        partial, out, norm, mixer.base, mixer.scale, x, new, tokens, mixer.norm_eps, mixer.hc_eps, **second,
        num_warps=_warps(dim), enable_fp_fusion=False,
    )  # fmt: skip


def _warps(dim: int) -> int:
    return 4 if dim <= 4096 else 8


def _group(tokens: int) -> int:
    """Matrices of a program: one costs what all its lanes cost, but their sums are added one after the other. The
    interpreter is quicker with more."""
    if interpreting():
        return 16 if tokens > 8 else 1 << (tokens - 1).bit_length()
    return 1 if tokens <= 512 else 4 if tokens <= 2048 else 16


def _mix_constants(tokens: int, dim: int, parts: int, rows: int) -> dict[str, int]:
    block = _BLOCK
    return {
        "D": dim,
        "PARTS": parts,
        "ROWS": rows,
        "COLS": 32 if rows > 4 else 16,
        "TILE": _TILE,
        "BLOCK": block,
        "BLOCKS": triton.cdiv(dim, block),
        "SHARERS": _SHARERS if tokens > _MANY * _TILE else 0,
    }


def _finish_constants(tokens: int, dim: int, rows: int, iterations: int) -> dict[str, int]:
    blocks = triton.cdiv(dim, _BLOCK)
    return {
        "D": dim,
        "WIDTH": triton.next_power_of_2(dim),
        "ROWS": rows,
        "COLS": 32 if rows > 4 else 16,
        "BLOCKS": blocks,
        "PADDED": triton.next_power_of_2(blocks),
        "ITERATIONS": iterations,
        "GROUP": _group(tokens),
    }


def aot() -> tuple[AotCase, ...]:
    """V4-Flash and V4-Pro, bfloat16: a few tokens and many, behind attention and behind the experts; the
    readout."""
    cases = []
    for model, dim in (("flash", 4096), ("pro", 7168)):
        for parts, rows, tokens in ((1, 24, 1), (7, 24, 1), (7, 24, 4096), (0, 24, 1), (0, 4, 1)):
            name = "head" if rows == 4 else f"{parts}_parts_{'few' if tokens == 1 else 'many'}"
            cases.append(_mix_case(f"hyper_mix_{model}_{name}", _mix_constants(tokens, dim, parts, rows)))
        for rows, iterations, tokens in ((24, 20, 1), (24, 20, 4096), (4, 0, 1)):
            name = "head" if rows == 4 else "few" if tokens == 1 else "many"
            cases.append(
                _finish_case(f"hyper_finish_{model}_{name}", _finish_constants(tokens, dim, rows, iterations))
            )
        post = {"D": dim, "PARTS": 7, "TILE": _TILE, "BLOCK": _BLOCK}
        pointers = {"h": "*bf16", "y": "*bf16", "mix": "*fp32", "out": "*bf16"}
        cases.append(_case(f"hyper_post_{model}", _post, pointers, {"tokens": "i32"}, post, _MIX_WARPS))
        row = {"D": dim, "WIDTH": triton.next_power_of_2(dim)}
        given = {"x": "*bf16", "stride": "i32", "weight": "*fp32", "eps": "fp32", "out": "*bf16"}
        cases.append(_case(f"rms_norm_{model}", _rms_norm, given, {}, row, _warps(dim)))
    return tuple(cases)


def _mix_case(name: str, constants: dict[str, int]) -> AotCase:
    pointers = {"h": "*bf16", "y": "*bf16", "mix": "*fp32", "out": "*bf16", "fn": "*fp32", "partial": "*fp32"}
    product = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16"
    return _case(name, _mix, pointers, {"tokens": "i32"}, constants, _MIX_WARPS, product)


def _finish_case(name: str, constants: dict[str, int]) -> AotCase:
    pointers = {"partial": "*fp32", "h": "*bf16", "norm": "*fp32", "base": "*fp32", "scale": "*fp32"}
    pointers |= {"x": "*bf16", "mix": "*fp32"}
    numbers = {"tokens": "i32", "norm_eps": "fp32", "hc_eps": "fp32"}
    wide = r"st\.global(\.\w+)*\.v4"
    return _case(name, finish, pointers, numbers, constants, _warps(constants["D"]), wide)


def _case(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    numbers: dict[str, str],
    constants: dict[str, int],
    warps: int,
    *expected: str,
) -> AotCase:
    expected = (*expected, r"ld\.global(\.\w+)*\.v[24]")
    return AotCase(
        name,
        kernel,
        pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constants,
        warps,
        expect={"sm90": expected, "sm100": expected},
        aligned=tuple(name for name, kind in pointers.items() if kind != "fp32"),
        options={"enable_fp_fusion": False},
    )
