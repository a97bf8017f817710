"""Lightning indexer: score every visible c4a entry for a query and keep the best.

score[t, j] = sum over heads of w[t, h] * relu(q[t, h] . k[j])   (DeepSeek-V4, c4a layers)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from weft.kernels.kv_rows import Rows
from weft.kernels.topk import top_k

# Entries are scored in multiples of this many columns; each product has K = index_head_dim, so columns do not
# mix and the width of a call changes no bit (tested, as is the number of queries in a block).
COLUMNS = 128
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class QueryBlocks:
    """Queries grouped so that each block reads the entries of one sequence.

    rows: [B, Q] int64 indices of queries in the batch, repeated at the end of a short block.
    keep: [B, Q] bool, False for those repeats.
    sequence: [B] int64 index of the sequence each block belongs to.
    visible: [B, Q] int64 entries each query may see.
    """

    rows: Tensor
    keep: Tensor
    sequence: Tensor
    visible: Tensor


def block_rows(heads: int) -> int:
    """Least queries per block: products with fewer than 8 rows may take another BLAS kernel."""
    return 8 // gcd(8, heads)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """q: [B, Q, n, dI] float32; weights: [B, Q, n] float32; keys: [B, C, dI] float32, C a multiple of COLUMNS.

    Returns [B, Q, C] float32. Row (b, q) does not depend on B, Q or C.
    """
    blocks, queries, heads, dim = q.shape
    product = torch.bmm(q.reshape(blocks, queries * heads, dim), keys.transpose(1, 2)).relu_()
    product = product.view(blocks * queries, heads, -1).mul_(weights.reshape(-1, heads, 1))
    # Halving adds keep the order of summation fixed and run at memory speed.
    while product.shape[1] > 1:
        half = product.shape[1] // 2
        folded = product[:, :half] + product[:, half : 2 * half]
        odd = product[:, 2 * half :]
        product = torch.cat((folded, odd), 1) if odd.shape[1] else folded
    return product.view(blocks, queries, -1)


def select_entries(
    q: Tensor, weights: Tensor, pool: Rows, tables: Tensor, blocks: QueryBlocks, k: int, out: Tensor
) -> None:
    """Write into out[row] the k best visible entries of each query in `blocks`, ascending, -1 padded.

    q: [T, n, dI]; weights: [T, n]; pool: key rows of width dI; tables: [S, E] int64 row of entry j of a sequence
    (0 where there is none), E a multiple of COLUMNS; out: [T, k] int64.
    """
    widest = int(blocks.visible.max()) if blocks.visible.numel() else 0
    columns = -(-widest // COLUMNS) * COLUMNS
    if columns == 0:
        out[blocks.rows[blocks.keep]] = -1
        return
    per_block = blocks.rows.shape[1] * columns * (q.shape[1] + 6)
    step = max(1, _BLOCK_ELEMENTS // max(1, per_block))
    for i in range(0, blocks.rows.shape[0], step):
        rows, keep = blocks.rows[i : i + step], blocks.keep[i : i + step]
        visible = blocks.visible[i : i + step]
        slots = tables[blocks.sequence[i : i + step], :columns]
        keys = pool.gather(slots.reshape(-1)).view(*slots.shape, -1)
        scores = index_scores(q[rows], weights[rows], keys)
        hidden = torch.arange(columns) >= visible[..., None]
        scores.masked_fill_(hidden, float("-inf"))
        chosen = top_k(scores.flatten(0, 1), k)
        out[rows[keep]] = chosen[keep.flatten()]
