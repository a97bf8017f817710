"""Taking back the rows of drafts: what a step changes in place is saved before it, and put back behind it.

A step of n rows overwrites n places of a compressor's tail, and folds n rows into an open group. The first row
of a sequence is never taken back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.gpu.compress import C4_TAIL
from weft.kernels.reference import verify as reference


def save_tails(
    tail: Tensor, slot: Tensor, start: Tensor, rows: int, *, implementation: str | None = None
) -> Tensor:
    """[L, S, rows, w] float32: of each sequence the rows that positions start + 1, start + 2, ... will overwrite.

    tail: [L, slots, 8, w] float32, position p at place p % 8. slot, start: [S] int32.
    """
    check_tensor("tail", tail, (None, None, C4_TAIL, None), torch.float32)
    check_tensor("slot", slot, (None,), torch.int32)
    check_tensor("start", start, (slot.numel(),), torch.int32)
    check(tail.is_contiguous() and 0 <= rows < C4_TAIL, rows)
    out = torch.empty(tail.shape[0], slot.numel(), rows, tail.shape[3], dtype=torch.float32, device=tail.device)
    if out.numel() == 0:
        return out
    if (implementation or choose(arch(tail), installed()).implementation) == "reference":
        reference.save_tails(tail, slot, start, out)
        return out
    from weft.kernels.triton.verify import save_tails as launch

    launch(tail, slot, start, out)
    return out


def take_back(
    tail: Tensor,
    saved: Tensor,
    fold: Tensor,
    behind: Tensor,
    streams: Tensor,
    h: Tensor,
    told: Tensor,
    *,
    implementation: str | None = None,
) -> None:
    """State of n sequences as it is behind the rows that are kept.

    told: [6, n] int32: which sequence of `saved` it is, its slot, the position of its first row, how many rows
    were computed, how many of them are kept, at least one and fewer, and the flat row of the first. tail: [L,
    slots, 8, w] and saved: as in `save_tails`. fold: [M, slots, 3, d] float32, behind: [M, T, 3, d], the folds
    behind each row. streams: [slots, ...], h: [n, ...] of the same dtype, of the last rows that are kept. tail,
    fold and streams are changed in place; a fold only if the next token does not begin a group.
    """
    check_tensor("told", told, (6, None), torch.int32)
    check_tensor("tail", tail, (None, None, C4_TAIL, None), torch.float32)
    check_tensor("saved", saved, (tail.shape[0], None, None, tail.shape[3]), torch.float32)
    check_tensor("fold", fold, (None, None, 3, None), torch.float32)
    check_tensor("behind", behind, (fold.shape[0], None, 3, fold.shape[3]), torch.float32)
    check(h.shape[1:] == streams.shape[1:] and h.dtype == streams.dtype and len(h) == told.shape[1], h.shape)
    check(all(x.is_contiguous() for x in (tail, saved, fold, behind, streams, h, told)), "contiguous")
    if told.shape[1] == 0:
        return
    if (implementation or choose(arch(tail), installed()).implementation) == "reference":
        reference.take_back(tail, saved, fold, behind, streams, h, told)
        return
    from weft.kernels.triton.verify import take_back as launch

    launch(tail, saved, fold, behind, streams, h, told)


def choose(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("verify", arch, libraries)


def least_bytes(tail: Tensor, fold: Tensor, streams: Tensor, rows: int, sequences: int) -> int:
    """Of `take_back`: `rows` rows of all tails in all, and a fold of every layer and streams of each sequence,
    read and written once."""
    row, state = tail.shape[0] * tail.shape[3], fold.shape[0] * 3 * fold.shape[3]
    return 8 * (rows * row + sequences * state) + 2 * sequences * streams[0].nbytes + 24 * sequences


OP = Op(
    "verify",
    "raw state of sequences saved before drafts, and put back behind those that were right",
    ("reference", "triton"),
    (Example("any shape", choose),),
)
