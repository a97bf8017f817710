"""Sparse attention of each query over its own list of KV rows, with a sink.

K and V are the same row (DeepSeek-V4 shares them). Every query brings the pool rows it attends to, in a fixed
slot layout that depends on its position alone, so prefill, decode and any batch do the same arithmetic. Keys
are taken in tiles of fixed width, added left to right: an empty tile adds exact zeros, hence padding a batch to
its longest member changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.kernels.constant import constant
from weft.kernels.kv_rows import Rows
from weft.kernels.linear import Array, Index

NEG_INF = np.float32("-inf")

# Gathered keys of one block of queries; the block size does not change the result.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class KeyList:
    """The KV rows each query attends to.

    index: [T * N] int64 rows of the pool, 0 where there is no key (row 0 of a pool is never used and stays 0).
    bias: [T, 1, N] float32, 0 or -inf where there is no key.
    tile: keys summed at a time; N is a multiple of it.
    """

    index: Tensor
    bias: Array
    tile: int

    @classmethod
    def of(cls, index: Index, tile: int) -> KeyList:
        """From an index [T, N] with -1 where there is no key."""
        assert index.shape[1] % tile == 0, (index.shape, tile)
        bias = np.where(index < 0, NEG_INF, np.float32(0))
        return cls(torch.from_numpy(np.maximum(index, 0).reshape(-1)), bias[:, None], tile)


def sparse_attention(q: Array, pool: Rows, keys: KeyList, sink: Array, scale: float) -> Array:
    """softmax over the listed keys and one sink logit per head, times the rows themselves.

    q: [T, H, d]; pool: rows of width d; sink: [H] (in the denominator only). Returns [T, H, d]. A query without
    keys gives zeros.
    """
    tokens, _, dim = q.shape
    width = keys.bias.shape[2]
    assert len(keys.bias) == tokens
    block = max(1, _BLOCK_BYTES // (4 * dim * max(1, width)))
    if tokens <= block:
        return _attend(q, pool, keys.index, keys.bias, keys.tile, sink, scale)
    out = np.empty_like(q)
    for i in range(0, tokens, block):
        index, bias = keys.index[i * width : (i + block) * width], keys.bias[i : i + block]
        out[i : i + block] = _attend(q[i : i + block], pool, index, bias, keys.tile, sink, scale)
    return out


def _attend(q: Array, pool: Rows, index: Tensor, bias: Array, tile: int, sink: Array, scale: float) -> Array:
    tokens, _, width = bias.shape
    rows: Array = pool.gather(index).numpy().reshape(tokens, width, -1)
    tiles = [slice(i, i + tile) for i in range(0, width, tile)]
    logits = np.empty((*q.shape[:2], width), np.float32)
    for part in tiles:
        np.matmul(q, rows[:, part].swapaxes(1, 2), out=logits[:, :, part])
    logits *= constant(scale)
    logits += bias
    # The maximum is exact in any order, so one global maximum needs no rescaling between tiles.
    top = np.maximum(np.maximum.reduce(logits, axis=2, keepdims=True), sink[:, None])
    logits -= top
    weights = np.exp(logits, out=logits)
    total = np.exp(sink[:, None] - top)
    out = np.zeros(q.shape, np.float32)
    for part in tiles:
        p = weights[:, :, part]
        total += np.add.reduce(p, axis=2, keepdims=True)
        out += p @ rows[:, part]
    out /= total
    return out
