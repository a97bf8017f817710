"""How large the tensors of a step are: as large as it needs, or padded, so that one captured graph serves many.

What a row becomes does not depend on any of these sizes: kernels split a row's own list, and read no further.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from weft.runtime.cache.capacity import C4_TAIL
from weft.runtime.cache.pools import Pools
from weft.runtime.config import C4, C128, LayerKind
from weft.runtime.model.batch import Batch

# Sequences of a padded step. Tokens that pad choose experts as others do, whose weights are then read for nothing:
# while a step reads few experts, there is a size for every number of sequences. From the largest one on, a step is
# long enough for the host to keep ahead of it.
_DENSE = 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32
SIZES: tuple[int, ...] = (*_DENSE, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# From so many tokens per sequence on, their keys are gathered once for all of them.
_PREFILL = 8
# Columns of lists: rows of them begin at multiples of 64 bytes.
_COLUMNS = 16


@dataclass(frozen=True)
class StepShape:
    """tokens, sequences: of the step. window_pages, c4_pages, c128_pages: columns of page tables; 0 if no layer
    is of that kind. visible: most c4a entries that a token sees; columns: most c128a entries. c4_entries,
    c128_entries: that the step completes. gathered: index keys of all its sequences, if they are gathered first.
    drafts: rows may be taken back, so folds behind each are kept.
    """

    tokens: int
    sequences: int
    window_pages: int
    c4_pages: int
    c128_pages: int
    visible: int
    columns: int
    c4_entries: int
    c128_entries: int
    gathered: int | None
    drafts: bool


def exact(batch: Batch, kinds: Collection[LayerKind]) -> StepShape:
    """What a batch needs."""
    page, window = batch.pools.sizes.page, batch.pools.config.sliding_window
    longest, sequences = int(batch.ends.max()), len(batch.spans)
    first = (batch.starts - window + 1).clip(0) // page
    prefill = "c4a" in kinds and batch.tokens >= _PREFILL * sequences

    def entries(ratio: int) -> int:
        done = batch.starts.clip(batch.chains) // ratio
        return int((batch.ends // ratio - done).clip(0).sum())

    return StepShape(
        batch.tokens,
        sequences,
        window_pages=int(((batch.ends - 1) // page - first).max()) + 1,
        **_of_context(longest, page, kinds),
        c4_entries=entries(C4) if "c4a" in kinds else 0,
        c128_entries=entries(C128) if "c128a" in kinds else 0,
        gathered=int((batch.ends // C4).sum()) if prefill else None,
        drafts=batch.folds is not None,
    )


def padded(batch: Batch, kinds: Collection[LayerKind]) -> StepShape | None:
    """The least of the padded shapes that holds a batch; None if the batch is a prefill, a replay or too large."""
    rows, sequences = int(batch.counts.max()), len(batch.spans)
    if batch.replays or rows > C4_TAIL or sequences > SIZES[-1]:
        return None
    longest = int(batch.ends.max())
    context = next(context for context in contexts(batch.pools) if context >= longest)
    size = size_of(-(-batch.tokens // rows))
    return _padded(batch.pools, kinds, rows * size, size_of(sequences), context, rows, batch.folds is not None)


def decodes(pools: Pools, kinds: Collection[LayerKind], sequences: int) -> Iterator[StepShape]:
    """The padded shapes of all steps of one token each for up to so many sequences, large ones first."""
    for size in reversed(SIZES[: bisect_left(SIZES, min(sequences, SIZES[-1])) + 1]):
        for context in reversed(contexts(pools) if {"c4a", "c128a"} & {*kinds} else (1,)):
            yield _padded(pools, kinds, size, size, context, 1, False)


def contexts(pools: Pools) -> tuple[int, ...]:
    """Lengths of the longest sequence that padded steps are made for. Up to the first, a token sees all c4a
    entries; then lists, tables and the indexer's scores have room for up to four times what is needed."""
    found, most = [C4 * pools.config.index_topk], pools.sizes.context + C4_TAIL
    while found[-1] < most:
        found.append(min(4 * found[-1], most))
    return tuple(found)


def _padded(
    pools: Pools, kinds: Collection[LayerKind], tokens: int, held: int, context: int, rows: int, drafts: bool
) -> StepShape:
    page = pools.sizes.page
    positions = pools.config.sliding_window - 1 + rows
    return StepShape(
        tokens,
        held,
        window_pages=-(-(positions - 1) // page) + 1,
        **_of_context(context, page, kinds),
        c4_entries=held * -(-rows // C4) if "c4a" in kinds else 0,
        c128_entries=held if "c128a" in kinds else 0,
        gathered=None,
        drafts=drafts,
    )


def size_of(count: int) -> int:
    """The least of SIZES that is not below `count`."""
    return SIZES[bisect_left(SIZES, count)]


def _of_context(tokens: int, page: int, kinds: Collection[LayerKind]) -> dict[str, int]:
    """What follows from the longest sequence."""

    def pages(ratio: int, kind: LayerKind) -> int:
        return max(1, -(-(tokens // ratio) // page)) if kind in kinds else 0

    columns = -(-(tokens // C128) // _COLUMNS) * _COLUMNS
    return {
        "c4_pages": pages(C4, "c4a"),
        "c128_pages": pages(C128, "c128a"),
        "visible": tokens // C4 if "c4a" in kinds else 0,
        "columns": columns if "c128a" in kinds else 0,
    }
