"""Sparse MLA attention over paged, quantised rows: window and compressed entries in one list, with a sink."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import (
    GLUON,
    Arch,
    Choice,
    Example,
    Op,
    Paged,
    arch,
    check,
    check_tensor,
    installed,
    portable,
)
from weft.kernels.gpu.output import inverse_rope
from weft.kernels.layouts import RowLayout, is_v4, kv_fp8, kv_fp8_v41
from weft.kernels.reference import attention as reference

# Columns that one program of the portable kernel takes. A list of at most so many is not split: its bytes are then
# read once and nothing else is moved. Longer ones are split at its multiples, whatever the batch.
SPLIT = 2048


def sparse_attention(
    q: Tensor,
    pool: Paged,
    index: Tensor,
    lengths: Tensor,
    sink: Tensor,
    scale: float,
    *,
    dtype: torch.dtype | None = None,
    split: int = SPLIT,
    rotate_back: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """softmax over each query's listed rows and one sink logit per head, times the rows themselves.

    q: [T, H, d] float16, bfloat16 or float32; products are taken in float16, so float16 is taken as it is. pool:
    rows of d channels, each of magnitude 57,344 at most (float16's range). index: [T, N] int32 rows of the pool,
    -1 for none; columns from lengths[t] (int32) on are not read. sink: [H] float32, in the denominator only.
    rotate_back: [T, rope] float32, cosines and sines of each query's position: the output's last rope channels
    are turned back by them, to the bits of `output.inverse_rope` behind this call; then `dtype` is bfloat16 or
    float32. One or two launches. Returns [T, H, d] of `dtype`, by default q's; zeros for a query without rows.
    Prefill and decode are the same call: a query's bits depend on q, its list and `split`. Source: DeepSeek-V4
    report, sections 2.3 and 3.
    """
    check_tensor("q", q, (None, None, pool.layout.channels), torch.float16, torch.bfloat16, torch.float32)
    tokens, heads, _ = q.shape
    check_tensor("index", index, (tokens, None), torch.int32)
    check_tensor("lengths", lengths, (tokens,), torch.int32)
    check_tensor("sink", sink, (heads,), torch.float32)
    check(split > 0, split)
    dtype = dtype or q.dtype
    if rotate_back is not None:
        _check_rotation(rotate_back, tokens, pool.layout.channels, dtype)
    if tokens == 0 or index.shape[1] == 0:
        return torch.zeros(q.shape, dtype=dtype, device=q.device)
    name = implementation or choose(arch(q), installed(), pool.layout).implementation
    if name == "reference":
        out = reference.sparse_attention(q, pool, index, lengths, sink, scale).to(dtype)
        return out if rotate_back is None else inverse_rope(out, rotate_back, implementation=name)
    if name == "flash_mla":
        from weft.kernels.libraries import flash_mla

        out = flash_mla.sparse_attention(q, pool, index, lengths, sink, scale).to(dtype)
        return out if rotate_back is None else inverse_rope(out, rotate_back)
    if name == "triton_sm100":
        from weft.kernels.triton.attention_sm100 import sparse_decode_sm100

        return sparse_decode_sm100(q, pool, index, lengths, sink, scale, dtype, cos_sin=rotate_back)
    if name == "triton_sm90":
        from weft.kernels.triton.attention_sm90 import sparse_attention as launch_sm90

        return launch_sm90(q.to(torch.float16), pool, index, lengths, sink, scale, dtype, rotate_back)
    from weft.kernels.triton.attention import sparse_attention as launch

    return launch(q.to(torch.float16), pool, index, lengths, sink, scale, dtype, split, rotate_back)


def _check_rotation(cos_sin: Tensor, tokens: int, channels: int, dtype: torch.dtype) -> None:
    check_tensor("rotate_back", cos_sin, (tokens, None), torch.float32)
    check(cos_sin.is_contiguous() and cos_sin.shape[1] % 2 == 0 and cos_sin.shape[1] <= channels, cos_sin.shape)
    check(dtype in (torch.bfloat16, torch.float32), dtype)


def choose(arch: Arch, libraries: frozenset[str], layout: RowLayout) -> Choice:
    """Not by the batch: no query's bits depend on it."""
    if is_v4(layout):
        if arch == "sm90" and "triton" in libraries:
            return Choice("sparse_attention", "triton_sm90", "Hopper's instructions, V4's rows")
        if arch == "sm100" and GLUON in libraries:
            return Choice("sparse_attention", "triton_sm100", "Blackwell's instructions, V4's rows; never run yet")
    return portable("sparse_attention", arch, libraries)


def least_bytes(tokens: int, columns: int, heads: int, pool: Paged, itemsize: int = 2, rope: int = 0) -> int:
    """q read and the output written once, every listed row and its number, and rotations, read once."""
    layout = pool.layout
    listed = columns * (layout.row_bytes + 4) + 4
    return tokens * (2 * heads * layout.channels * itemsize + listed + 4 * rope) + 4 * heads


OP = Op(
    "sparse_attention",
    "attention of each query over its own list of quantised rows, with a sink",
    ("reference", "triton", "triton_sm90", "triton_sm100", "flash_mla"),
    (
        Example("V4, 584-byte rows", partial(choose, layout=kv_fp8(64, 448, 64))),
        Example("V4.1, 528-byte rows", partial(choose, layout=kv_fp8_v41(64))),
    ),
)
