"""Copies between pages of every layer's pool, and between slots of raw state: forks, checkpoints, restores.

A table of addresses lets one launch copy the same pages (or slots) of all tensors, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch_of, check, check_tensor, installed, portable
from weft.kernels.reference import copies as reference


@dataclass(frozen=True)
class PageTable:
    """Tensors whose first dimension counts pages (or slots), and on their device where they are.

    tensors: each [n, ...], a page contiguous. addresses, strides, sizes: [L] int64, of page 0, from one page to
    the next, and of one page, in bytes. largest: of sizes. word: 16, 8, 4, 2 or 1 bytes; it divides all of them.
    """

    tensors: tuple[Tensor, ...]
    addresses: Tensor
    strides: Tensor
    sizes: Tensor
    largest: int
    word: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> PageTable:
        """A kind of page that begins at page b of a layer's pool is the slice [b:] of its bytes. The table is made
        once: making it copies three small tensors to the device."""
        check(bool(tensors) and all(t.device == tensors[0].device for t in tensors), "one device")
        rows = []
        for tensor in tensors:
            size = tensor[0].numel() * tensor.element_size()
            check(tensor.shape[0] > 0 and tensor[0].is_contiguous(), "a page is contiguous", tensor.shape)
            rows.append((tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), size))
        word = next(w for w in (16, 8, 4, 2, 1) if all(number % w == 0 for row in rows for number in row))
        addresses, strides, sizes = torch.tensor(rows, dtype=torch.int64).T.contiguous().to(tensors[0].device)
        return cls(tuple(tensors), addresses, strides, sizes, max(size for *_, size in rows), word)

    @property
    def nbytes(self) -> int:
        """Bytes of one page in all tensors."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self.tensors)


@dataclass(frozen=True)
class SlotTable(PageTable):
    """The raw state of sequences: a slot of every layer."""

    @classmethod
    def of_state(cls, c4_tail: Tensor, c128_fold: Tensor, streams: Tensor) -> SlotTable:
        """c4_tail: [L, slots, 8, w]; c128_fold: [L, slots, 3, d]; streams: [slots, hc, D]. L may be 0."""
        table = PageTable.of([*c4_tail, *c128_fold, streams])
        return cls(**vars(table))


def copy_pages(pools: PageTable, source: Tensor, target: Tensor, *, implementation: str | None = None) -> None:
    """Copy pages source[i] -> target[i], [n] int32, in every tensor of the table; -1 in either: none.

    A source may stand there many times; no target twice, and none among the sources.
    """
    check_tensor("source", source, (None,), torch.int32)
    check_tensor("target", target, (source.numel(),), torch.int32)
    if source.numel() == 0:
        return
    device = pools.addresses.device
    chosen = implementation or choose(arch_of(device.type, device.index), installed()).implementation
    if chosen == "reference":
        reference.copy_pages(pools.tensors, source, target)
        return
    from weft.kernels.triton.copies import copy_pages as launch

    launch(pools, source, target)


def copy_slots(state: SlotTable, source: Tensor, target: Tensor, *, implementation: str | None = None) -> None:
    """As `copy_pages`, of raw state: saving and restoring checkpoints, and forks."""
    copy_pages(state, source, target, implementation=implementation)


def choose(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("copies", arch, libraries)


def least_bytes(table: PageTable, copies: int) -> int:
    """Pages read and written, the table and the numbers once."""
    return 2 * copies * table.nbytes + 24 * len(table.tensors) + 8 * copies


OP = Op(
    "copies",
    "pages of every layer's pool, or slots of raw state, copied in one launch",
    ("reference", "triton"),
    (Example("any shape", choose),),
)
