"""Brute force for `kernels.gpu.topk`: a stable sort of every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def top_k_rows(
    logits: Tensor,
    visible: Tensor,
    k: int,
    tables: Tensor,
    sequence: Tensor,
    page: int,
    base: int,
    out: Tensor,
    column: int,
) -> None:
    """As the wrapper of this name."""
    out[:, column : column + k] = -1
    for token, count in enumerate(visible.tolist()):
        scores = logits[token, :count].double()
        order = torch.sort(scores, descending=True, stable=True).indices
        entries = order[:k].sort().values
        table = tables[int(sequence[token])].long()
        rows = base + table[entries // page] * page + entries % page
        out[token, column : column + len(entries)] = rows.to(torch.int32)


@dataclass(frozen=True)
class TopKExample:
    """Arguments of `top_k_rows`."""

    logits: Tensor
    visible: Tensor
    k: int
    tables: Tensor
    sequence: Tensor
    page: int
    base: int
    out: Tensor
    column: int


def example(
    tokens: int,
    entries: int,
    *,
    k: int = 512,
    page: int = 64,
    window: int = 128,
    base: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TopKExample:
    """V4-Flash at decode: a token per sequence, `entries` visible of each, rows behind the window's in `out`.

    Scores are sums of rectified values, hence positive and close together, as the indexer's are.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    pages = -(-entries // page)
    shape = (tokens, entries)
    normal = torch.randn(shape, generator=generator, device=device)
    logits = 4.0 + 0.5 * normal
    order = torch.randperm(tokens * pages, generator=generator, device=device)
    return TopKExample(
        logits,
        torch.full((tokens,), entries, dtype=torch.int32, device=device),
        k,
        (1 + order).to(torch.int32).view(tokens, pages),
        torch.arange(tokens, dtype=torch.int32, device=device),
        page,
        base,
        torch.full((tokens, window + k), -1, dtype=torch.int32, device=device),
        window,
    )
