"""Linears: which tiles and splits a shape gets, launches, and what is compiled without a GPU.

Splits of K follow from the weight's shape alone, and are added in order whether they run side by side or in turn;
the tiles of rows and tokens change no sum. So a token's bits are the same in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.weights import GROUP, FloatWeight, Fp8Weight
from weft.kernels.triton.linear_float import float_linear
from weft.kernels.triton.linear_float import quantise_rows as _quantise_rows
from weft.kernels.triton.linear_fp8 import fp8_linear as _fp8_linear

# A split is as long as makes about two programs for each of Hopper's 132 multiprocessors; 4 chunks at least.
_PROGRAMS = 264
_LEAST_CHUNKS = 4
# The rows of the tile by which splits are counted; tiles of many tokens have twice as many rows.
_ROWS = 64
# Up to so many wide tiles splits run side by side; from there on, writing their sums costs more than it wins.
_FEW_TILES = 66
# Up to so many tokens each program quantises what it reads: by then it takes as long as a launch of its own.
FUSED_TOKENS = 64
_QUANTISE = {"ROWS": 16, "CHUNKS": 4}


@dataclass(frozen=True)
class Plan:
    """How a product runs. per, splits: of K, by the weight's shape. parallel: splits side by side. registers: of a
    thread at most, so that two programs fit in a multiprocessor."""

    per: int
    splits: int
    parallel: bool
    rows: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None

    def tiles(self, tokens: int, rows: int, groups: int) -> tuple[int, int]:
        """Tiles of tokens, and of a weight's rows."""
        return triton.cdiv(tokens, self.tokens), groups * triton.cdiv(rows // groups, self.rows)


def split(rows: int, columns: int, groups: int) -> tuple[int, int]:
    """Chunks of 128 per split, and splits, of a weight [rows, columns]."""
    chunks = triton.cdiv(columns, GROUP)
    tiles = groups * triton.cdiv(rows // groups, _ROWS)
    splits = triton.cdiv(chunks, max(_LEAST_CHUNKS, triton.cdiv(tiles * chunks, _PROGRAMS)))
    per = triton.cdiv(chunks, splits)
    return per, triton.cdiv(chunks, per)


def config(rows: int, columns: int, groups: int, tokens: int, dtype: torch.dtype) -> Plan:
    """The plan of a weight [rows, columns] of `dtype` and so many tokens."""
    per, splits = split(rows, columns, groups)
    tiles = groups * triton.cdiv(rows // groups, _ROWS)
    if dtype == torch.float32:  # without matrix instructions: for few tokens or small models
        return Plan(per, splits, splits > 1 and tiles * triton.cdiv(tokens, 16) <= _PROGRAMS, _ROWS, 16, 4, 2)
    fp8 = dtype == torch.float8_e4m3fn
    if tokens <= FUSED_TOKENS:
        # Weights on their way decide: 48 KiB in a multiprocessor and more. Taller tiles read x less often from L2,
        # but leave fewer programs.
        width = max(16, triton.next_power_of_2(tokens))
        if tiles // 2 * splits < (_PROGRAMS // 2 - 4 if width > 16 else _PROGRAMS - 8):
            return Plan(per, splits, splits > 1, _ROWS, width, 4, 5 if width <= 32 else 4)
        if splits > 1:
            return Plan(per, splits, True, 2 * _ROWS, width, 8, 4)
        return Plan(per, splits, False, 2 * _ROWS, width, 8, 4 if not fp8 or width == 32 else 3, 128)
    wide = groups * triton.cdiv(rows // groups, 2 * _ROWS) * triton.cdiv(tokens, 128)
    parallel = splits > 1 and wide <= _FEW_TILES
    # A product, the sum of its split and the sum of splits are too much for 128 tokens in registers.
    width = 64 if splits > 1 and not parallel and fp8 else 128
    return Plan(per, splits, parallel, 2 * _ROWS, width, 8, 4)


def _partial(plan: Plan, tiles: int, x: Tensor) -> Tensor | None:
    if not plan.parallel:
        return None
    return torch.empty(tiles * plan.splits * plan.rows * plan.tokens, dtype=torch.float32, device=x.device)


def fp8_linear(x: Tensor, weight: Fp8Weight, norm: tuple[Tensor, float] | None, out: Tensor) -> None:
    """See `weft.kernels.gpu.linear.fp8_linear`; x: [T, G, K], out: what it returns."""
    tokens, groups, columns = x.shape
    rows = weight.shape[0]
    plan = config(rows, columns, groups, tokens, weight.codes.dtype)
    x_scales, norm_weight, eps = None, None, 0.0
    if tokens > FUSED_TOKENS:
        x, x_scales = quantise_rows(x, norm)
    elif norm is not None:
        norm_weight, eps = norm
    token_tiles, row_tiles = plan.tiles(tokens, rows, groups)
    tiles = token_tiles * row_tiles
    _fp8_linear[(tiles * (plan.splits if plan.parallel else 1),)](
        x, x_scales, norm_weight, weight.codes, weight.scales, _partial(plan, tiles, x), weight.locks, out,
        tokens, token_tiles, x.stride(0), x.stride(1), 0 if x_scales is None else x_scales.shape[2], out.stride(0),
        eps, **_constants(rows, columns, groups, plan), N=rows, NORM=norm_weight is not None,
        QUANTISED=x_scales is not None, num_warps=plan.warps, num_stages=plan.stages,
        maxnreg=plan.registers,
    )  # fmt: skip


def linear(x: Tensor, weight: FloatWeight, norm: tuple[Tensor, float] | None, out: Tensor) -> None:
    """See `weft.kernels.gpu.linear.linear`; x: [T, G, K], out: what it returns."""
    tokens, groups, columns = x.shape
    rows = weight.shape[0]
    plan = config(rows, columns, groups, tokens, weight.weight.dtype)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    token_tiles, row_tiles = plan.tiles(tokens, rows, groups)
    tiles = token_tiles * row_tiles
    float_linear[(tiles * (plan.splits if plan.parallel else 1),)](
        x, norm_weight, weight.weight, _partial(plan, tiles, x), weight.locks, out,
        tokens, token_tiles, x.stride(0), x.stride(1), out.stride(0), eps,
        **_constants(rows, columns, groups, plan), NORM=norm is not None, BK=_step(weight.weight.dtype),
        num_warps=plan.warps, num_stages=plan.stages,
        maxnreg=plan.registers,
    )  # fmt: skip


def quantise_rows(x: Tensor, norm: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor]:
    """x [T, G, K] -> codes [T, G, K] e4m3, scales [G, chunks, T or a few more] uint8, of which T are meant."""
    tokens, groups, columns = x.shape
    chunks, pitch = triton.cdiv(columns, GROUP), triton.cdiv(tokens, 16) * 16
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(groups, chunks, pitch, dtype=torch.uint8, device=x.device)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    grid = (triton.cdiv(tokens, _QUANTISE["ROWS"]), triton.cdiv(chunks, _QUANTISE["CHUNKS"]), groups)
    _quantise_rows[grid](
        x, norm_weight, codes.view(torch.uint8), scales, tokens, x.stride(0), x.stride(1), pitch, eps,
        K=columns, GROUPS=groups, NORM=norm is not None, **_QUANTISE, num_warps=4,
    )  # fmt: skip
    return codes, scales


def _step(dtype: torch.dtype) -> int:
    """Columns of a float weight that are multiplied at once; the same for any number of tokens."""
    return 32 if dtype == torch.float32 else 64


def _constants(rows: int, columns: int, groups: int, plan: Plan) -> dict[str, Any]:
    return {
        "R": rows // groups,
        "K": columns,
        "PER": plan.per,
        "SPLITS": plan.splits,
        "PARALLEL": plan.parallel,
        "BM": plan.rows,
        "BN": plan.tokens,
        "STAGES": plan.stages,
    }


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's linears at decode and prefill."""
    e4m3, bf16 = torch.float8_e4m3fn, torch.bfloat16
    return (
        _product("fp8_wq_a_wkv_1", e4m3, 1536, 4096, 1),
        _product("fp8_wq_b_norm_16", e4m3, 32768, 1024, 16, norm=True),
        _product("fp8_wq_b_norm_64", e4m3, 32768, 1024, 64, norm=True),
        _product("fp8_wo_a_32", e4m3, 8192, 4096, 32, groups=8),
        _product("fp8_wo_b_64", e4m3, 4096, 8192, 64),
        _product("fp8_wq_a_wkv_128", e4m3, 1536, 4096, 128),
        _product("fp8_wq_b_4096", e4m3, 32768, 1024, 4096),
        _product("fp8_wo_b_4096", e4m3, 4096, 8192, 4096),
        _product("bf16_compressor_c4_1", bf16, 2560, 4096, 1),
        _product("bf16_compressor_c128_32", bf16, 1024, 4096, 32),
        _product("bf16_head_16", bf16, 129280, 4096, 16),
        _product("bf16_head_64", bf16, 129280, 4096, 64),
        _product("bf16_compressor_c4_4096", bf16, 2560, 4096, 4096),
        _product("fp32_gate_16", torch.float32, 256, 4096, 16),
        _quantisation("quantise_rows", 4096, 1, norm=False),
        _quantisation("quantise_rows_norm", 1024, 1, norm=True),
        _quantisation("quantise_rows_groups", 4096, 8, norm=False),
    )


def _product(
    name: str, dtype: torch.dtype, rows: int, columns: int, tokens: int, *, groups: int = 1, norm: bool = False
) -> AotCase:
    plan = config(rows, columns, groups, tokens, dtype)
    fp8 = dtype == torch.float8_e4m3fn
    quantised = fp8 and tokens > FUSED_TOKENS
    kinds = {torch.float8_e4m3fn: "*fp8e4nv", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    constants = _constants(rows, columns, groups, plan) | {"NORM": norm and not quantised}
    signature = {"x": "*fp8e4nv" if quantised else "*bf16", "norm": "*fp32", "partial": "*fp32", "locks": "*i32"}
    strides = ("x_stride", "group_stride", "out_stride")
    signature |= dict.fromkeys(("tokens", "token_tiles", *strides), "i32") | {"eps": "fp32"}
    if fp8:
        constants |= {"N": rows, "QUANTISED": quantised}
        signature |= {
            "codes": kinds[dtype],
            "scales": "*u8",
            "x_scales": "*u8",
            "scale_pitch": "i32",
            "out": "*bf16",
        }
        expect = {"sm90": (r"wgmma\S+\.e4m3\.e4m3", "LDGSTS"), "sm100": (r"tcgen05\.mma\S+f8f6f4", "LDGSTS")}
    else:
        constants |= {"BK": _step(dtype)}
        signature |= {"weight": kinds[dtype], "out": "*fp32"}
        expect = {"sm90": (r"wgmma\S+\.bf16\.bf16", "LDGSTS"), "sm100": (r"tcgen05\.mma\S+f16", "LDGSTS")}
    absent = {"partial": plan.parallel, "norm": constants["NORM"], "x_scales": quantised}
    constants |= {key: None for key, there in absent.items() if not there and key in signature}
    kernel = _fp8_linear if fp8 else float_linear
    return AotCase(
        name,
        kernel,
        {key: "constexpr" if key in constants else signature[key] for key in kernel.arg_names},
        constants,
        warps=plan.warps,
        stages=plan.stages,
        options={} if plan.registers is None else {"maxnreg": plan.registers},
        expect=expect if dtype != torch.float32 else {"sm90": ("FFMA",), "sm100": ("FFMA",)},
        aligned=(*(k for k, v in signature.items() if v[0] == "*" and k not in constants), *strides, "scale_pitch")
        if fp8
        else (*(k for k, v in signature.items() if v[0] == "*" and k not in constants), *strides),
    )


def _quantisation(name: str, columns: int, groups: int, *, norm: bool) -> AotCase:
    constants: dict[str, Any] = {"K": columns, "GROUPS": groups, "NORM": norm, **_QUANTISE}
    constants |= {} if norm else {"norm": None}
    kinds = {"x": "*bf16", "norm": "*fp32", "codes": "*u8", "scales": "*u8", "eps": "fp32"}
    names = _quantise_rows.arg_names
    signature = {key: "constexpr" if key in constants else kinds.get(key, "i32") for key in names}
    aligned = tuple(
        k for k, v in signature.items() if v[0] == "*" or k in ("x_stride", "group_stride", "scale_pitch")
    )
    expect = (r"cvt\.rn\.satfinite\.e4m3x2", r"ld\.global\.v4")
    return AotCase(
        name, _quantise_rows, signature, constants, expect={"sm90": expect, "sm100": expect}, aligned=aligned
    )
