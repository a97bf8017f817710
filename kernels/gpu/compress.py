"""The compressors on device tensors: pool rows of tokens into entries, and keep the raw state of open groups.

c4a: entry j is a per-channel softmax over tokens 4j-4..4j-1 (first half of the channels) and 4j..4j+3 (second
half). c128a: entry j folds tokens 128j..128j+127, left to right. An entry is then normalised, rotated at the
position of its group's first token, quantised and stored. Semantics: `weft.kernels.compress`; published inference
code for the order of norm, RoPE, Hadamard rotation and rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, Paged, arch, check, check_tensor, installed, portable
from weft.kernels.reference import compress as reference

C4 = 4
C4_TAIL = 8
C128 = 128


@dataclass(frozen=True)
class C4Plan:
    """Which tokens of a step belong to which sequence, and which entries they complete. int32 tensors.

    start, count, offset, slot: [S] position of a sequence's first token in this step, how many tokens, the flat
    row of the first, and the slot of its raw state. Count 0 pads the plan; no two others share a slot.
    entries: [S + 1] entries[s]..entries[s + 1] - 1 are sequence s's entries.
    sequence, number, target, key_target: [E] whose entry it is (-1 pads), which entry of the sequence (ascending),
    and the rows of the KV pool and of the key pool that it is stored in. Entries that are not to be stored are not
    listed.
    """

    start: Tensor
    count: Tensor
    offset: Tensor
    slot: Tensor
    entries: Tensor
    sequence: Tensor
    number: Tensor
    target: Tensor
    key_target: Tensor


@dataclass(frozen=True)
class C128Plan:
    """As `C4Plan`, without keys."""

    start: Tensor
    count: Tensor
    offset: Tensor
    slot: Tensor
    entries: Tensor
    sequence: Tensor
    number: Tensor
    target: Tensor


def completed(
    start: NDArray[np.int64], count: NDArray[np.int64], ratio: int, chain: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`entries` [S + 1], `sequence` [E] and `number` [E] of a plan: the entries that spans complete.

    chain: [S] entries of groups that begin below it are left out.
    """
    first = (start if chain is None else np.maximum(start, chain)) // ratio
    many = np.maximum((start + count) // ratio - first, 0)
    entries = np.concatenate((np.zeros(1, np.int64), many.cumsum()))
    sequence = np.repeat(np.arange(many.size), many)
    return entries, sequence, np.arange(sequence.size) - entries[sequence] + first[sequence]


def compress_c4(
    rows: Tensor,
    ape: Tensor,
    tail: Tensor,
    norm: Tensor,
    key_norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C4Plan,
    pool: Paged,
    keys: Paged,
    eps: float,
    *,
    hadamard: bool,
    implementation: str | None = None,
) -> None:
    """Store the entries and index keys that a step completes, and bring the tails up to date.

    rows: [T, 2 (2d + 2dI)] float32, channels [value 2d, index value 2dI, score 2d, index score 2dI].
    ape: [4, 2d + 2dI] float32, added to the scores of position p from row p % 4.
    tail: [slots, 8, 2 (2d + 2dI)] float32, changed in place: position p at place p % 8, scores with ape added.
    norm: [d], key_norm: [dI] float32. cos_sin_entries: [E, rope] float32 at positions 4 * number.
    hadamard: rotate the keys before rounding. pool, keys: written at plan.target and plan.key_target.
    """
    wide = _check_c4(rows, ape, tail, norm, key_norm, cos_sin_entries, plan, pool, keys)
    check(not hadamard or key_norm.numel() & (key_norm.numel() - 1) == 0, "Hadamard needs a power of two")
    if wide == 0 or plan.start.numel() == 0:
        return
    if (implementation or choose_c4(arch(rows), installed()).implementation) == "reference":
        reference.compress_c4(
            rows, ape, tail, norm, key_norm, cos_sin_entries, plan, pool, keys, eps, hadamard=hadamard
        )
        return
    from weft.kernels.triton.compress import compress_c4 as launch

    launch(rows, ape, tail, norm, key_norm, cos_sin_entries, plan, pool, keys, eps, hadamard=hadamard)


def compress_c128(
    rows: Tensor,
    ape: Tensor,
    fold: Tensor,
    norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C128Plan,
    pool: Paged,
    eps: float,
    *,
    behind: Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Fold a step's tokens into the open groups, and store the entries that they complete.

    rows: [T, 2d] float32, channels [value d, score d]. ape: [128, d] float32, added to the scores of position p
    from row p % 128. fold: [slots, 3, d] float32, changed in place: (max, sum, weighted sum) of a group that is
    open behind the step; read only where a step begins inside a group. norm: [d] float32. cos_sin_entries:
    [E, rope] float32 at positions 128 * number. pool: written at plan.target. behind: [T, 3, d] float32, gets the
    state of its group behind each row, except of rows whose group is complete and not listed.
    """
    check_tensor("rows", rows, (None, None), torch.float32)
    dim = rows.shape[1] // 2
    entries = _check_plan(plan, C128)
    check_tensor("ape", ape, (C128, dim), torch.float32)
    check_tensor("fold", fold, (None, 3, dim), torch.float32)
    check_tensor("norm", norm, (dim,), torch.float32)
    check_tensor("cos_sin_entries", cos_sin_entries, (entries, None), torch.float32)
    check(fold.is_contiguous() and ape.is_contiguous() and cos_sin_entries.is_contiguous(), "contiguous")
    check(pool.layout.channels == dim, pool.layout, dim)
    if behind is not None:
        check_tensor("behind", behind, (rows.shape[0], 3, dim), torch.float32)
        check(behind.is_contiguous(), "behind is not contiguous")
    if rows.shape[0] == 0 or plan.start.numel() == 0:
        return
    if (implementation or choose_c128(arch(rows), installed()).implementation) == "reference":
        reference.compress_c128(rows, ape, fold, norm, cos_sin_entries, plan, pool, eps, behind=behind)
        return
    from weft.kernels.triton.compress_c128 import compress_c128 as launch

    launch(rows, ape, fold, norm, cos_sin_entries, plan, pool, eps, behind=behind)


def choose_c4(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("compress_c4", arch, libraries)


def choose_c128(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("compress_c128", arch, libraries)


def least_bytes_c4(plan: C4Plan, width: int, rope: int, pool: Paged, keys: Paged) -> int:
    """Each token's row read once and, if it stays in the tail, written once; the tail rows that entries pool, half
    of the channels of each; ape, norms and rotations once; entries written. width: channels of a row."""
    listed = plan.sequence >= 0
    begin = plan.start.long()[plan.sequence.clamp_min(0).long()][listed]
    first = plan.number.long()[listed] * C4
    old = (begin - (first - C4).clamp_min(0)).clamp(0, C4_TAIL).sum()
    tokens, kept, entries = int(plan.count.sum()), plan.count.clamp_max(C4_TAIL).sum(), int(listed.sum())
    state = tokens * width + int(old) * width // 2 + int(kept) * width
    constants = _places(plan, C4) * width // 2 + (width // 4 + entries * rope if entries else 0)
    return 4 * (state + constants) + entries * (pool.layout.row_bytes + keys.layout.row_bytes)


def least_bytes_c128(plan: C128Plan, dim: int, rope: int, pool: Paged, *, behind: bool = False) -> int:
    """Each token's row, the state of groups that were open or stay open, the rows of ape that the tokens need, the
    norm and rotations once; entries written."""
    start, count = plan.start.long(), plan.count.long()
    live = count > 0
    read = int(((start % C128 != 0) & live).sum())
    written = int((((start + count) % C128 != 0) & live).sum())
    tokens, entries = int(count.sum()), int((plan.sequence >= 0).sum())
    words = tokens * 2 * dim + (read + written) * 3 * dim + _places(plan, C128) * dim
    words += (dim + entries * rope if entries else 0) + behind * tokens * 3 * dim
    return 4 * words + entries * pool.layout.row_bytes


def _places(plan: C4Plan | C128Plan, ratio: int) -> int:
    """How many places of a group have a token in the step: rows of ape that are needed."""
    spans = zip(plan.start.tolist(), plan.count.tolist(), strict=True)
    return len({(start + step) % ratio for start, count in spans for step in range(min(count, ratio))})


def _check_c4(
    rows: Tensor,
    ape: Tensor,
    tail: Tensor,
    norm: Tensor,
    key_norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C4Plan,
    pool: Paged,
    keys: Paged,
) -> int:
    """Number of tokens."""
    check_tensor("norm", norm, (None,), torch.float32)
    check_tensor("key_norm", key_norm, (None,), torch.float32)
    dim, key_dim = norm.numel(), key_norm.numel()
    half = 2 * (dim + key_dim)
    entries = _check_plan(plan, C4)
    check_tensor("key_target", plan.key_target, (entries,), torch.int32)
    check_tensor("rows", rows, (None, 2 * half), torch.float32)
    check_tensor("ape", ape, (C4, half), torch.float32)
    check_tensor("tail", tail, (None, C4_TAIL, 2 * half), torch.float32)
    check_tensor("cos_sin_entries", cos_sin_entries, (entries, None), torch.float32)
    check(tail.is_contiguous() and ape.is_contiguous() and cos_sin_entries.is_contiguous(), "contiguous")
    check(pool.layout.channels == dim and keys.layout.channels == key_dim, pool.layout, keys.layout)
    return rows.shape[0]


def _check_plan(plan: C4Plan | C128Plan, ratio: int) -> int:
    """Number of entries."""
    sequences = plan.start.numel()
    for name in ("start", "count", "offset", "slot"):
        check_tensor(name, getattr(plan, name), (sequences,), torch.int32)
    check_tensor("entries", plan.entries, (sequences + 1,), torch.int32)
    entries = plan.sequence.numel()
    for name in ("sequence", "number", "target"):
        check_tensor(name, getattr(plan, name), (entries,), torch.int32)
    return entries


OP = Op(
    "compress",
    "entries pooled, normalised, rotated, quantised and stored; raw state of open groups",
    ("reference", "triton"),
    (Example("4:1, with index keys", choose_c4), Example("128:1", choose_c128)),
)
