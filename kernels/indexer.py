"""Lightning indexer: score every visible c4a entry for a query and keep the best.

score[t, j] = sum over heads of w[t, h] * relu(q[t, h] . k[j])   (DeepSeek-V4, c4a layers)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.constant import constant
from weft.kernels.kv_rows import Rows
from weft.kernels.linear import Array, Index
from weft.kernels.topk import top_k

# Entries are scored in multiples of this many columns; each product has K = index_head_dim, so columns do not
# mix and the width of a call changes no bit (tested, as is the number of queries in a block).
COLUMNS = 128
_BLOCK_ELEMENTS = 1 << 23
NEG_INF = np.float32("-inf")


@dataclass(frozen=True)
class QueryBlocks:
    """Queries grouped so that each block reads the entries of one sequence.

    rows: [B, Q] indices of queries in the batch, repeated at the end of a short block.
    keep: [B, Q] bool, False for those repeats.
    sequence: [B] index of the sequence each block belongs to.
    visible: [B, Q] entries each query may see.
    """

    rows: Index
    keep: NDArray[np.bool_]
    sequence: Index
    visible: Index


def block_rows(heads: int) -> int:
    """Least queries per block: products with fewer than 8 rows may take another BLAS kernel."""
    return 8 // gcd(8, heads)


def index_scores(q: Array, weights: Array, keys: Tensor) -> Array:
    """q: [B, Q, n, dI]; weights: [B, Q, n]; keys: [B, C, dI] float32, C a multiple of COLUMNS.

    Returns [B, Q, C]. Row (b, q) does not depend on B, Q or C.
    """
    blocks, queries, heads, dim = q.shape
    # torch's product, because numpy's takes another order for other widths.
    rows = torch.from_numpy(q.reshape(blocks, queries * heads, dim))
    product = torch.bmm(rows, keys.transpose(1, 2)).numpy().reshape(blocks * queries, heads, -1)
    np.maximum(product, constant(0.0), out=product)
    product *= weights.reshape(-1, heads, 1)
    # Halving adds keep the order of summation fixed and run at memory speed.
    while heads > 1:
        half = heads // 2
        product[:, :half] += product[:, heads - half : heads]
        heads -= half
    return product[:, 0].reshape(blocks, queries, -1)


def select_entries(
    q: Array, weights: Array, pool: Rows, tables: Index, blocks: QueryBlocks, k: int, out: Index
) -> None:
    """Write into out[row] the k best visible entries of each query in `blocks`, ascending, -1 padded.

    q: [T, n, dI]; weights: [T, n]; pool: key rows of width dI; tables: [S, E] row of entry j of a sequence
    (0 where there is none), E a multiple of COLUMNS; out: [T, k].
    """
    widest = int(blocks.visible.max(initial=0))
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
        keys = pool.gather(torch.from_numpy(slots.reshape(-1))).view(*slots.shape, -1)
        scores = index_scores(q[rows], weights[rows], keys)
        scores[np.arange(columns) >= visible[:, :, None]] = NEG_INF
        chosen = top_k(torch.from_numpy(scores.reshape(-1, columns)), k).numpy()
        out[rows[keep]] = chosen[keep.reshape(-1)]
