"""The best keys of each row of scores, as pool rows for sparse attention.

Exact and deterministic: among equal scores the lower entry wins, and entries come out ascending, so that the set
and its order depend on the row's scores alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable


def choose(width: int, k: int, arch: Arch, libraries: frozenset[str]) -> Choice:
    """What picks the k best of `width`."""
    return portable("topk", arch, libraries)


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
    *,
    implementation: str | None = None,
) -> None:
    """Write the pool rows of the k best entries of each row into out[:, column:column + k], -1 padded.

    logits: [T, C] float32, rows contiguous. visible: [T] int32, at most C: a row's entries; columns behind them
    are not read, and NaN is not allowed among them (-inf is the lowest score, not an absence). tables: [S, P]
    int32 page numbers, sequence: [T] int32: entry e of token t is row base + tables[sequence[t], e // page] * page
    + e % page. out: [T, N] int32. Rows with visible <= k take all their entries, and their scores are not read.
    """
    tokens, width = logits.shape
    check_tensor("logits", logits, (tokens, width), torch.float32)
    check_tensor("visible", visible, (tokens,), torch.int32)
    check_tensor("tables", tables, (None, None), torch.int32)
    check_tensor("sequence", sequence, (tokens,), torch.int32)
    check_tensor("out", out, (tokens, None), torch.int32)
    check(column >= 0 and column + k <= out.shape[1], column, k, out.shape)
    check(tables.is_contiguous() and page > 0, "tables")
    if tokens == 0 or k == 0:
        return
    name = implementation or choose(width, k, arch(out), installed()).implementation
    if name == "reference":
        from weft.kernels.reference.topk import top_k_rows as reference

        reference(logits, visible, k, tables, sequence, page, base, out, column)
        return
    check(name == "triton", name)
    from weft.kernels.triton.topk import top_k_rows as triton

    triton(logits, visible, k, tables, sequence, page, base, out, column)


def least_bytes(tokens: int, entries: int, k: int) -> int:
    """`entries`: visible ones of the rows that have more than k. Scores read once, a page number read and a pool
    row written per choice, sequence and count read once."""
    return 4 * entries + tokens * (8 * k + 8)


OP = Op(
    "topk",
    "the best k scores of a row as pool rows, ascending, ties to the lower entry",
    ("reference", "triton"),
    (
        Example("V4-Flash, 8k tokens", partial(choose, 2048, 512)),
        Example("V4-Pro, 1M tokens", partial(choose, 262144, 1024)),
    ),
)
