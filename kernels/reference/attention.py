"""Sparse attention in float64, query by query: what every implementation is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged, Pages
from weft.kernels.layouts import RowLayout, kv_fp8
from weft.kernels.reference.rows import gather, store


def sparse_attention(q: Tensor, pool: Paged, index: Tensor, lengths: Tensor, sink: Tensor, scale: float) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`: [T, H, d] float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for token in range(len(q)):
        rows = index[token, : int(lengths[token])]
        keys = gather(pool, rows[rows >= 0])
        logits = torch.cat((q[token].double() @ keys.T * scale, sink.double()[:, None]), 1)
        out[token] = logits.softmax(1)[:, :-1] @ keys
    return out


@dataclass(frozen=True)
class Example:
    """Arguments of one call."""

    q: Tensor
    pool: Pages
    index: Tensor
    lengths: Tensor
    sink: Tensor
    scale: float


def example(
    tokens: int,
    columns: int,
    heads: int = 64,
    layout: RowLayout | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float16,
    pages: int | None = None,
    spread: float = 1.0,
) -> Example:
    """Queries and rows as a model has them: normed, so of magnitude 1, every row of a query another one.

    pages: of the pool; by default enough for every query to have rows of its own. spread: factor of the rows.
    """
    layout = layout or kv_fp8(64, 448, 64)
    total = pages or -(-tokens * columns // layout.page) + 2
    pool = Pages.empty(total, layout, device)
    rows = torch.arange(layout.page, total * layout.page, device=device, dtype=torch.int32)
    for part in rows.split(1 << 16):
        store(pool, part, torch.randn(len(part), layout.channels, device=device) * spread)
    pick = torch.randint(len(rows), (tokens, columns), device=device)
    if tokens * columns <= len(rows):
        pick = torch.randperm(len(rows), device=device)[: tokens * columns].view(tokens, columns)
    return Example(
        torch.randn(tokens, heads, layout.channels, device=device).to(dtype),
        pool,
        rows[pick],
        torch.full((tokens,), columns, dtype=torch.int32, device=device),
        torch.randn(heads, device=device),
        layout.channels**-0.5,
    )
