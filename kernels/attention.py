"""Sparse attention of each query over its own list of KV rows, with a sink.

K and V are the same row (DeepSeek-V4 shares them). Every query brings the pool rows it attends to, in a fixed
slot layout that depends on its position alone, so prefill, decode and any batch do the same arithmetic. Keys
are taken in tiles of fixed width, added left to right: an empty tile adds exact zeros, hence padding a batch to
its longest member changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.constant import constant
from weft.kernels.kv_rows import Rows

# Gathered keys of one block of queries; the block size does not change the result.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class KeyList:
    """The KV rows each query attends to.

    index: [T, N] int64 rows of the pool, 0 where there is no key (row 0 of a pool is never used and stays 0).
    bias: [T, 1, N] float32, 0 or -inf where there is no key.
    tile: keys summed at a time; N is a multiple of it.
    """

    index: Tensor
    bias: Tensor
    tile: int

    @classmethod
    def of(cls, index: Tensor, tile: int) -> KeyList:
        """From an index with -1 where there is no key."""
        assert index.shape[1] % tile == 0, (index.shape, tile)
        bias = torch.zeros(index.shape).masked_fill_(index < 0, float("-inf"))
        return cls(index.clamp_min(0), bias[:, None], tile)


def sparse_attention(q: Tensor, pool: Rows, keys: KeyList, sink: Tensor, scale: float) -> Tensor:
    """softmax over the listed keys and one sink logit per head, times the rows themselves.

    q: [T, H, d] float32; pool: rows of width d; sink: [H] float32 (in the denominator only).
    Returns [T, H, d] float32. A query without keys gives zeros.
    """
    tokens, _, dim = q.shape
    assert keys.index.shape[0] == tokens
    if tokens == 0:
        return torch.zeros_like(q)
    block = max(1, _BLOCK_BYTES // (4 * dim * max(1, keys.index.shape[1])))
    if tokens <= block:
        return _attend(q, pool, keys.index, keys.bias, keys.tile, sink, scale)
    parts = [
        _attend(
            q[i : i + block],
            pool,
            keys.index[i : i + block],
            keys.bias[i : i + block],
            keys.tile,
            sink,
            scale,
        )
        for i in range(0, tokens, block)
    ]
    return torch.cat(parts)


def _attend(q: Tensor, pool: Rows, index: Tensor, bias: Tensor, tile: int, sink: Tensor, scale: float) -> Tensor:
    tokens, width = index.shape
    rows = pool.gather(index.view(-1)).view(tokens, width, -1)
    tiles = rows.split(tile, dim=1)
    scores = [torch.bmm(q, part.transpose(1, 2)) for part in tiles]
    logits = scores[0] if len(tiles) == 1 else torch.cat(scores, dim=2)
    logits = logits.mul_(constant(scale)).add_(bias)
    sink = sink[:, None].expand(tokens, -1, 1)
    # The maximum is exact in any order, so one global maximum needs no rescaling between tiles.
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = logits.sub_(top).exp_()
    total = torch.exp(sink - top)
    out: Tensor | None = None
    for part, p in zip(tiles, weights.split(tile, dim=2), strict=True):
        total = total + p.sum(-1, keepdim=True)
        value = torch.bmm(p, part)
        out = value if out is None else out + value
    assert out is not None
    return out / total
