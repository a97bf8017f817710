"""What stands between the projections and attention: norm and RoPE of queries and of the KV row, and its store."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, Paged, arch, check, check_tensor, installed, portable
from weft.kernels.reference import heads as reference


def norm_rope_store(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    cos_sin: Tensor,
    rows: Tensor,
    pool: Paged,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Queries normalised per head (no weight) and rotated; the KV row normalised, rotated, quantised and stored.

    q: [T, H, d], kv: [T, d] of the same dtype, bfloat16 or float32, each possibly columns of wider rows (of q,
    a row's heads are contiguous). kv_weight: [d] float32.
    cos_sin: [T, rope] float32. rows: [T] int32 where each KV row goes, -1: nowhere; no row twice. pool: written.
    Returns [T, H, d] of `dtype`, by default q's. Source: DeepSeek-V4's published inference code: norm before RoPE,
    in float32.
    """
    check_tensor("q", q, (None, None, None), torch.bfloat16, torch.float32)
    tokens, _, dim = q.shape
    check_tensor("kv", kv, (tokens, dim), q.dtype)
    check_tensor("kv_weight", kv_weight, (dim,), torch.float32)
    check_tensor("cos_sin", cos_sin, (tokens, None), torch.float32)
    check_tensor("rows", rows, (tokens,), torch.int32)
    check(cos_sin.is_contiguous() and (q.shape[1] == 1 or q.stride(1) == dim), "cos_sin, heads of q: contiguous")
    check(pool.layout.channels == dim and cos_sin.shape[1] <= dim, pool.layout, dim)
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    if tokens == 0:
        return out
    if (implementation or choose(arch(q), installed()).implementation) == "reference":
        return out.copy_(reference.norm_rope_store(q, kv, kv_weight, cos_sin, rows, pool, eps))
    from weft.kernels.triton.heads import norm_rope_store as launch

    launch(q, kv, kv_weight, cos_sin, rows, pool, eps, out)
    return out


def choose(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("norm_rope_store", arch, libraries)


def least_bytes(tokens: int, heads: int, dim: int, rope: int, itemsize: int, pool: Paged) -> int:
    """q read and written, kv read, its rows written, rotations, row numbers and the weight once."""
    activations = tokens * (2 * heads + 1) * dim * itemsize
    return activations + tokens * (4 * rope + 4 + pool.layout.row_bytes) + 4 * dim


OP = Op(
    "norm_rope_store",
    "per-head norm and RoPE of q; norm, RoPE, quantisation and store of the KV row",
    ("reference", "triton"),
    (Example("any shape", choose),),
)
