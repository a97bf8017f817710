"""Taking back the last rows of a step: raw state as it was before drafts that turned out wrong.

Rows and entries that such drafts have written lie beyond the sequence's length, in pages that it alone holds, and
are written again before anything reads them. What a step changes in place is the compressors' raw state and the
streams of the last token; those are put back here, of all sequences together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weft.kernels.gpu.verify import save_tails, take_back
from weft.runtime.cache.capacity import C4_TAIL
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.model.batch import Batch


class TakeBack:
    """Make it before the step runs; the batch must have been made with `drafts`."""

    def __init__(self, batch: Batch) -> None:
        assert batch.folds is not None
        self._batch = batch
        # The host's own pools are no business of device kernels, nor of their interpreter.
        self._how = None if isinstance(batch.pools, DevicePools) else "reference"
        self._kept: dict[int, tuple[int, Tensor]] = {}
        slot, start = batch.pools.numbers(np.stack((batch.slots, batch.starts)))
        most = min(int(batch.counts.max()), C4_TAIL)
        self._saved = save_tails(batch.pools.c4_tail, slot, start, most - 1, implementation=self._how)

    def keep(self, number: int, count: int, streams: Tensor) -> None:
        """Of sequence `number` of the batch only the first `count` rows, one at least, are to have been computed.
        streams: [n, hc, D] of all its rows. Done by `apply`."""
        assert 0 < count <= self._batch.counts[number] <= C4_TAIL
        if count < self._batch.counts[number]:
            self._kept[number] = count, streams[count - 1]

    def apply(self) -> None:
        """Put back the state behind the rows that are kept. Sequences of which nothing was said keep all rows."""
        batch, pools = self._batch, self._batch.pools
        assert batch.folds is not None
        if not self._kept:
            return
        own = np.array(list(self._kept))
        kept = np.array([count for count, _ in self._kept.values()])
        told = np.stack((own, batch.slots[own], batch.starts[own], batch.counts[own], kept, batch.offsets[own]))
        fold = pools.c128_fold
        behind = fold.new_zeros(0, batch.tokens, *fold.shape[2:])
        if len(fold):
            behind = torch.stack([batch.folds[layer] for layer in range(len(fold))])
        h = torch.stack([row for _, row in self._kept.values()])
        state = pools.c4_tail, self._saved, fold, behind, pools.streams, h, pools.numbers(told)
        take_back(*state, implementation=self._how)
        self._kept.clear()
