"""Linears: FP8 weights with FP8 activations, and plain float weights; decode and prefill are the same call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.gpu.weights import GROUP, FloatWeight, Fp8Weight, pack_fp8
from weft.kernels.reference import linear as reference

__all__ = ["OP", "choose", "fp8_linear", "least_bytes", "linear", "pack_fp8", "quantise_rows"]

_FLOATS = (torch.bfloat16, torch.float32)
# RMS weight [K] and eps: x * rsqrt(mean x^2 + eps) * weight in float32, rounded to x's type.
Norm = tuple[Tensor, float] | None


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight,
    *,
    norm: Norm = None,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """x times the weight, both FP8 per 128 of K: [T, N] of `dtype`, by default x's.

    x: [T, K], or [T, groups, K] where block g of the weight's rows sees x[:, g]; bfloat16 or float32; rows may be
    strided. Its codes are e4m3, its scales the least powers of two that fit amax, 1e-4 at least; 128 products are
    summed in float32 and then scaled. norm: applied to x before that. Up to 64 tokens in one launch, else in two.
    Source: DeepSeek-V4's published inference code (act_quant and fp8_gemm with ue8m0 scales).
    """
    rows, columns = weight.shape
    x = _checked(x, columns, rows, norm, groups)
    check_tensor("codes", weight.codes, (rows, columns), torch.float8_e4m3fn)
    check_tensor("scales", weight.scales, (-(-columns // GROUP), rows), torch.uint8)
    check(weight.codes.is_contiguous() and weight.scales.is_contiguous(), "codes and scales are contiguous")
    out = torch.empty(x.shape[0], rows, dtype=dtype or x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if (implementation or choose("fp8_linear", arch(x), installed()).implementation) == "reference":
        return out.copy_(reference.fp8_linear(x, weight, norm))
    from weft.kernels.triton.linear import fp8_linear as launch

    launch(x, weight, norm, out)
    return out


def linear(
    x: Tensor,
    weight: FloatWeight,
    *,
    norm: Norm = None,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """x times a weight of plain floats, summed in float32: [T, N] of `dtype`, by default x's. One launch.

    x: as in `fp8_linear`; it is cast to the weight's type, after the norm.
    """
    rows, columns = weight.shape
    x = _checked(x, columns, rows, norm, groups)
    check_tensor("weight", weight.weight, (rows, columns), *_FLOATS)
    check(weight.weight.is_contiguous(), "the weight is contiguous")
    out = torch.empty(x.shape[0], rows, dtype=dtype or x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if (implementation or choose("linear", arch(x), installed()).implementation) == "reference":
        return out.copy_(reference.linear(x, weight, norm))
    from weft.kernels.triton.linear import linear as launch

    launch(x, weight, norm, out)
    return out


def quantise_rows(x: Tensor, norm: Norm = None, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """What `fp8_linear` makes of x [T, K]: codes [T, K] float8_e4m3fn, scales [T, ceil(K / 128)] uint8 (E8M0; the
    tokens of a chunk lie together)."""
    x = _checked(x, x.shape[1], 1, norm, 1)
    if x.shape[0] == 0:
        scales = torch.empty(0, -(-x.shape[2] // GROUP), dtype=torch.uint8, device=x.device)
        return torch.empty(0, x.shape[2], dtype=torch.float8_e4m3fn, device=x.device), scales
    if (implementation or choose("quantise_rows", arch(x), installed()).implementation) == "reference":
        codes, scales = reference.quantise_rows(x, norm)
        return codes[:, 0], scales[:, 0]
    from weft.kernels.triton.linear import quantise_rows as launch

    codes, scales = launch(x, norm)
    return codes[:, 0], scales[0, :, : x.shape[0]].t()


def _checked(x: Tensor, columns: int, rows: int, norm: Norm, groups: int) -> Tensor:
    """x as [T, groups, K]."""
    check(rows % groups == 0 and rows * columns < 2**31, "rows of a group, and places in int32", rows, columns)
    if x.dim() == 2:
        x = x.unflatten(1, (groups, -1))
    check_tensor("x", x, (None, groups, columns), *_FLOATS)
    if norm is not None:
        check_tensor("norm", norm[0], (columns,), *_FLOATS)
    return x


def choose(op: str, arch: Arch, libraries: frozenset[str]) -> Choice:
    """DeepGEMM and cuBLAS sum in an order that depends on the number of tokens: never chosen."""
    return portable(op, arch, libraries)


def least_bytes(
    tokens: int, weight: Fp8Weight | FloatWeight, groups: int, itemsize: int, out_itemsize: int
) -> int:
    """The weight and x read once, the result written once."""
    rows, columns = weight.shape
    if isinstance(weight, Fp8Weight):
        size = weight.codes.numel() + weight.scales.numel()
    else:
        size = weight.weight.numel() * weight.weight.element_size()
    return size + tokens * (groups * columns * itemsize + rows * out_itemsize)


OP = Op(
    "linear",
    "x times FP8 weights, quantised on the way (fp8_linear), or plain float weights (linear)",
    ("reference", "triton"),
    (
        Example("FP8 weights", partial(choose, "fp8_linear")),
        Example("bfloat16 or float32 weights", partial(choose, "linear")),
    ),
)
