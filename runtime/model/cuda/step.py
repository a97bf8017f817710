"""One step on the device: what every layer shares.

The host sends a few numbers per sequence and the page tables, in one copy (`host_input`); everything else is
made of them on the device, in one launch (`weft.kernels.gpu.steps`). So a step's shape, `StepShape`, says all
that the host must know to run or capture it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.kernels.gpu.compress import C4Plan, C128Plan
from weft.kernels.gpu.steps import EntrySpans, Listed, StepSizes, StepSpans, step_index
from weft.kernels.linear import Index
from weft.runtime.cache.capacity import PageKind
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.config import C4, C128, LayerKind
from weft.runtime.model.batch import Batch
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda.packed import Packed, align
from weft.runtime.model.cuda.shape import StepShape, exact
from weft.runtime.model.cuda.side import Side

Numbers = NDArray[np.int32]
# What each query attends to.
Keys = Listed


# Numbers per sequence, in the order in which the host writes them.
_NUMBERS = ("slot", "start", "count", "offset", "last", "window_first")


@lru_cache(maxsize=4096)
def layout(shape: StepShape) -> Packed:
    """What the host says of a step of this shape: numbers per sequence, padding behind; tokens; page tables."""
    sequences = (shape.sequences,)
    shapes: dict[str, tuple[int, ...]] = {"numbers": (len(_NUMBERS), align(shape.sequences))}
    shapes |= {"ids": (shape.tokens,), "window_table": (*sequences, shape.window_pages)}
    for kind, pages in (("c4", shape.c4_pages), ("c128", shape.c128_pages)):
        if pages:
            shapes |= {f"{kind}_first": sequences, f"{kind}_entries": (shape.sequences + 1,)}
            shapes[f"{kind}_table"] = (*sequences, pages)
    if shape.gathered is not None:
        shapes |= dict.fromkeys(("key_count", "key_start"), sequences)
    return Packed(shapes)


def host_input(batch: Batch, ids: Tensor, shape: StepShape) -> Tensor:
    """The buffer of the host that says of a batch what `DeviceStep` reads. ids: [T] of the host."""
    packed = layout(shape)
    host = packed.host(batch.pools.device)
    to = packed.arrays(host)
    many, own = batch.tokens, len(batch.spans)
    to["ids"][:many] = ids.numpy()
    numbers = to["numbers"]
    if own < shape.sequences or many < shape.tokens:
        to["ids"][many:] = -1
        numbers[3, own:], numbers[4, own:] = many, -1
    first = np.maximum(batch.starts - (batch.pools.config.sliding_window - 1), 0) // batch.pools.sizes.page
    numbers[:, :own] = batch.slots, batch.starts, batch.counts, batch.offsets, batch.last, first
    _window(batch, first, to["window_table"][:own])
    if shape.c4_pages:
        _entries(batch, "c4", C4, to["c4_first"][:own], to["c4_entries"], to["c4_table"][:own])
    if shape.c128_pages:
        _entries(batch, "c128", C128, to["c128_first"][:own], to["c128_entries"], to["c128_table"][:own])
    if shape.gathered is not None:
        counts = batch.ends // C4
        to["key_count"][:own], to["key_start"][:own] = counts, counts.cumsum() - counts
    return host


def idle_input(shape: StepShape, device: torch.device) -> Tensor:
    """Of a step of which every token and sequence pads: it touches the state of nobody."""
    host = layout(shape).host(device)
    to = layout(shape).arrays(host)
    to["ids"][:], to["numbers"][4] = -1, -1
    return host


def _window(batch: Batch, first: Index, pages: Numbers) -> None:
    """The pages of each sequence's window, from the first that it needs on."""
    page, table, slots = batch.pools.sizes.page, batch.pools.tables["window"].numpy(), batch.slots
    number = np.minimum(first[:, None] + np.arange(pages.shape[1]), table.shape[1] - 1)
    np.floor_divide(table[slots[:, None], number], page, out=pages, casting="unsafe")
    ends = np.minimum(table[slots, batch.starts // page], table[slots, (batch.ends - 1) // page])
    assert ends.min() > 0, "rows that are not reserved, or that the window has left"


def _entries(batch: Batch, kind: PageKind, ratio: int, first: Numbers, bounds: Numbers, pages: Numbers) -> None:
    """The entries that a step completes, and the pages of every entry that a sequence has behind it."""
    page, table, own = batch.pools.sizes.page, batch.pools.tables[kind].numpy(), len(first)
    begun = np.maximum(batch.starts, batch.chains) // ratio
    first[:] = begun
    np.maximum(batch.ends // ratio - begun, 0).cumsum(out=bounds[1 : own + 1], dtype=np.int32)
    bounds[own + 1 :] = bounds[own]
    width = min(pages.shape[1], table.shape[1])
    np.floor_divide(table[batch.slots, :width], page, out=pages[:, :width], casting="unsafe")


class DeviceStep:
    """Index tensors of a step on its pools' device. Expires with the batch that its input was made of."""

    def __init__(
        self,
        shape: StepShape,
        given: Tensor,
        pools: DevicePools,
        rope: Rope,
        side: Side | None = None,
    ) -> None:
        """given: `host_input` of this shape, on the device. rope: on the device."""
        self.shape = shape
        self.pools = pools
        self.window = pools.config.sliding_window
        self.tokens, self.sequences = shape.tokens, shape.sequences
        self.prefill = shape.gathered is not None
        # By layer among the c128a layers, [T, 3, d] behind each row; None if no row may be taken back.
        self.folds: dict[int, Tensor] | None = {} if shape.drafts else None
        self._side = side or Side(pools.device)
        self._of = layout(shape).tensors(given)
        self._of |= dict(zip(_NUMBERS, self._of["numbers"][:, : shape.sequences].unbind(), strict=True))
        self._index = step_index(self._spans(), self._sizes(), rope.plain, rope.compressed)
        self.ids = self._of["ids"]
        self.last = self._of["last"]
        self.slots = self._of["slot"]
        self.position, self.sequence = self._index.position, self._index.sequence
        self.window_rows = self._index.window_rows
        self.plain, self.compressed = self._index.plain, self._index.compressed
        self.window_keys = self._index.window
        self.c128_keys = self._index.c128
        # Window, then k entries: all that are visible where there are no more than k, else what the indexer of a
        # layer writes there, each layer anew.
        self.c4_keys = self._index.c4
        self.c4_visible = self._index.c4_visible

    @classmethod
    def of(
        cls, batch: Batch, ids: Tensor, rope: Rope, kinds: Collection[LayerKind], side: Side | None = None
    ) -> DeviceStep:
        """Of a batch as it is. ids: [T] of the host; kinds: of the layers that will run."""
        assert isinstance(batch.pools, DevicePools)
        shape = exact(batch, kinds)
        given = host_input(batch, ids, shape).to(batch.pools.device, non_blocking=True)
        return cls(shape, given, batch.pools, rope, side)

    def _spans(self) -> StepSpans:
        of = self._of
        kinds = [
            EntrySpans(of[f"{kind}_first"], of[f"{kind}_entries"], of[f"{kind}_table"])
            if f"{kind}_table" in of
            else None
            for kind in ("c4", "c128")
        ]
        return StepSpans(of["start"], of["count"], of["offset"], of["window_first"], of["window_table"], *kinds)

    def _sizes(self) -> StepSizes:
        shape, pools = self.shape, self.pools
        return StepSizes(
            shape.tokens,
            self.window,
            pools.config.index_topk,
            shape.columns,
            shape.c4_entries,
            shape.c128_entries,
            pools.sizes.page,
            pools.base["c4"],
            pools.base["c128"],
        )

    # -- a second stream --------------------------------------------------------------------------------

    def side(self) -> AbstractContextManager[None]:
        """Work within runs beside what follows, until `join`; see `Side` for what must be held until then."""
        return self._side.beside()

    def join(self) -> None:
        self._side.join()

    # -- c4a --------------------------------------------------------------------------------------------

    @property
    def most_visible(self) -> int:
        """Entries that no token of a step of this shape sees more of."""
        return self.shape.visible

    @property
    def c4_table(self) -> Tensor:
        """[S, P] page numbers of each sequence's entries."""
        return self._of["c4_table"]

    @property
    def c4_entries(self) -> Tensor:
        """[E, rope] rotations of the entries that the step completes."""
        return self._index.c4_entries.turn

    @property
    def gathered_keys(self) -> tuple[Tensor, Tensor, int]:
        """For `gather_keys`: how many keys each sequence has, where they begin in a buffer, and its size."""
        assert self.shape.gathered is not None
        return self._of["key_count"], self._of["key_start"], self.shape.gathered

    @cached_property
    def key_start(self) -> Tensor:
        """[T] where the keys of a token's sequence begin in that buffer."""
        return self._of["key_start"][self.sequence]

    @cached_property
    def c4_plan(self) -> C4Plan:
        done = self._index.c4_entries
        return C4Plan(*self._plan("c4"), done.sequence, done.number, done.target, done.key_target)

    def _plan(self, kind: PageKind) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        of = self._of
        return of["start"], of["count"], of["offset"], of["slot"], of[f"{kind}_entries"]

    # -- c128a ------------------------------------------------------------------------------------------

    @property
    def c128_entries(self) -> Tensor:
        return self._index.c128_entries.turn

    @cached_property
    def c128_plan(self) -> C128Plan:
        done = self._index.c128_entries
        return C128Plan(*self._plan("c128"), done.sequence, done.number, done.target)

    def behind(self, layer: int, width: int) -> Tensor | None:
        """[T, 3, d] for the folds behind each row of the `layer`-th c128a layer, if rows may be taken back."""
        if self.folds is None:
            return None
        self.folds[layer] = torch.empty(self.tokens, 3, width, device=self.position.device)
        return self.folds[layer]
