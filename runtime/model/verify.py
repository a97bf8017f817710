"""Taking back the last rows of a step: raw state as it was before drafts that turned out wrong.

Rows and entries that such drafts have written lie beyond the sequence's length, in pages that it alone holds, and
are written again before anything reads them. What a step changes in place is the compressors' raw state and the
streams of the last token; those are put back here.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, from_numpy

from weft.runtime.cache.capacity import C4_TAIL
from weft.runtime.config import C128
from weft.runtime.model.batch import Batch


class TakeBack:
    """Make it before the step runs; the batch must have been made with `drafts`."""

    def __init__(self, batch: Batch) -> None:
        assert batch.folds is not None
        self._batch = batch
        self._tails = batch.pools.c4_tail[:, from_numpy(batch.slots)]

    def keep(self, number: int, count: int, streams: Tensor) -> None:
        """Of sequence `number` of the batch only the first `count` rows, one at least, are to have been computed.
        streams: [n, hc, D] of all its rows."""
        batch, pools = self._batch, self._batch.pools
        slot, start = int(batch.slots[number]), int(batch.starts[number])
        assert 0 < count <= batch.counts[number] <= C4_TAIL and batch.folds is not None
        rows = from_numpy(np.arange(start + count, batch.ends[number]) % C4_TAIL)
        if len(rows):
            pools.c4_tail[:, slot, rows] = self._tails[:, number, rows]
        if (start + count) % C128:  # else the next token opens a group
            for layer, behind in batch.folds.items():
                pools.c128_fold[layer, slot] = behind[int(batch.offsets[number]) + count - 1]
        pools.streams[slot] = streams[count - 1]
