"""The lists of a step by their definitions, one sequence at a time; rotations in float32, as they are defined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weft.kernels.gpu.steps import Entries, EntrySpans, StepIndex, StepSizes, StepSpans


def step_index(spans: StepSpans, sizes: StepSizes, plain: Tensor, compressed: Tensor, out: StepIndex) -> None:
    """See `weft.kernels.gpu.steps.step_index`; out: what it returns."""
    for zeros in (out.position, out.sequence, out.c4_visible):
        zeros.zero_()
    out.window_rows.fill_(-1)
    for listed in (out.window, out.c4, out.c128):
        listed.index.fill_(-1)
        listed.lengths.zero_()
    numbers = zip(spans.start.tolist(), spans.count.tolist(), spans.offset.tolist(), strict=True)
    for sequence, (start, count, offset) in enumerate(numbers):
        if count:
            rows = slice(offset, offset + count)
            position = torch.arange(start, start + count, device=out.position.device)
            out.position[rows], out.sequence[rows] = position.int(), sequence
            _window(spans, sizes, sequence, position, rows, out)
            _compressed(spans, sizes, sequence, position, rows, out)
    out.plain.copy_(rotation(out.position, plain))
    out.compressed.copy_(rotation(out.position, compressed))
    _entries(spans.c4, sizes, 4, sizes.c4_base, compressed, out.c4_entries)
    _entries(spans.c128, sizes, 128, sizes.c128_base, compressed, out.c128_entries)


def rotation(position: Tensor, frequencies: Tensor) -> Tensor:
    """[T], [rope / 2] -> [T, rope] float32."""
    angle = position.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), 1)


def _window(
    spans: StepSpans, sizes: StepSizes, sequence: int, position: Tensor, rows: slice, out: StepIndex
) -> None:
    """Positions t-W+1..t that there are, oldest first, in all three lists."""
    first = (position - sizes.window + 1).clamp_min(0)
    place = first[:, None] + torch.arange(sizes.window, device=position.device)
    seen = place <= position[:, None]
    page = place.clamp_max(int(position[-1])) // sizes.page - spans.window_first[sequence]
    row = spans.window[sequence].long()[page.long()] * sizes.page + place % sizes.page
    index = torch.where(seen, row, -1).int()
    out.window_rows[rows] = row.gather(1, (position - first)[:, None])[:, 0].int()
    for listed in (out.window, out.c4, out.c128):
        if listed.index.shape[1]:
            listed.index[rows, : sizes.window] = index
            listed.lengths[rows] = seen.sum(1).int()


def _compressed(
    spans: StepSpans, sizes: StepSizes, sequence: int, position: Tensor, rows: slice, out: StepIndex
) -> None:
    """Entries at their places behind the window, as far as there is room."""
    kinds = (
        (spans.c4, 4, sizes.c4_base, sizes.top_k, out.c4),
        (spans.c128, 128, sizes.c128_base, sizes.columns, out.c128),
    )
    out.c4_visible[rows] = ((position + 1) // 4).int()
    for kind, ratio, base, columns, listed in kinds:
        if kind is None:
            continue
        visible = ((position + 1) // ratio).clamp_max(columns)
        entry = torch.arange(int(visible.max()), device=position.device)
        row = base + kind.table[sequence].long()[entry // sizes.page] * sizes.page + entry % sizes.page
        listed.index[rows, sizes.window : sizes.window + len(entry)] = torch.where(
            entry < visible[:, None], row, -1
        ).int()
        listed.lengths[rows] = torch.where(visible > 0, sizes.window + visible, out.window.lengths[rows]).int()


def _entries(
    kind: EntrySpans | None, sizes: StepSizes, ratio: int, base: int, frequencies: Tensor, out: Entries
) -> None:
    for nothing in (out.sequence, out.target, out.key_target):
        nothing.fill_(-1)
    out.number.zero_()
    if kind is not None:
        bounds = kind.entries.tolist()
        for sequence, first in enumerate(kind.first.tolist()):
            own = slice(bounds[sequence], bounds[sequence + 1])
            number = first + torch.arange(own.stop - own.start, device=out.number.device)
            table = kind.table[sequence].long()
            row = table[number // sizes.page] * sizes.page + number % sizes.page
            out.sequence[own], out.number[own] = sequence, number.int()
            out.key_target[own], out.target[own] = row.int(), (row + base).int()
    out.turn.copy_(rotation(out.number * ratio, frequencies))


def embed_streams(weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.steps.embed_streams`."""
    rows = weight[ids.clamp_min(0).long()]
    out.copy_(torch.where(ids[:, None] >= 0, rows, 0)[:, None])


def store_rows(rows: Tensor, source: Tensor, target: Tensor, out: Tensor) -> None:
    """See `weft.kernels.gpu.steps.store_rows`."""
    kept = source >= 0
    out[target[kept].long()] = rows[source[kept].long()]
