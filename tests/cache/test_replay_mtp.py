"""The MTP block's window comes back with a replay too, if it begins one window earlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from support.cuts import model_of, tokens_of
from support.run import pools_for
from weft.runtime.cache.base import replay_start
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch

RATIOS = (0, 4, 128, 4)


class Drafter:
    """A cold sequence that has run its MTP block all along, and others that take its chain."""

    def __init__(self, window: int, length: int) -> None:
        self.model = model_of(window, *RATIOS)
        self.tokens = tokens_of(length + 1)
        self.pools = pools_for(self.model, [self.tokens] * 3, page=16)
        self.first = SequenceState(self.pools)
        self.run(self.first, length)

    def run(self, state: SequenceState, end: int, chunk: int = 1 << 20) -> None:
        while state.length < end:
            start, count = state.length, min(chunk, end - state.length)
            state.reserve(count)
            batch = Batch(self.pools, [state.span(count)])
            streams = self.model.forward(torch.tensor(self.tokens[start : start + count]), batch)
            self.model.forward_mtp(streams, torch.tensor(self.tokens[start + 1 : start + count + 1]), batch)
            state.commit(count)

    def replayed(self, cut: int, start: int, chunk: int) -> SequenceState:
        state = SequenceState(self.pools)
        pages = {
            kind: {n: self.first.pages[kind][n] for n in range(-(-(cut // ratio) // 16))}
            for kind, ratio in (("c4", 4), ("c128", 128))
        }
        state.adopt(pages, cut)
        state.begin_replay(start)
        self.run(state, cut, chunk)
        return state

    def rows(self, state: SequenceState, cut: int) -> Tensor:
        """The MTP window rows p-W .. p-2 of a state at p."""
        window = self.model.config.sliding_window
        numbers = [
            self.pools.tables["window"][state.slot, at // 16] + at % 16 for at in range(cut - window, cut - 1)
        ]
        return self.pools.kv[-1].gather(torch.tensor(numbers))

    def poison(self) -> None:
        """Window rows that the first sequence does not hold read as NaN."""
        held = set(self.first.pages["window"].values())
        for rows in self.pools.kv:
            for page in range(self.pools.sizes.pages("window", self.model.config.sliding_window)):
                if page not in held:
                    rows.tensor[max(page * 16, 1) : (page + 1) * 16] = torch.nan  # type: ignore[attr-defined]
        free = [slot for slot in range(self.pools.sizes.slots) if slot != self.first.slot]
        for tensor in (self.pools.c4_tail, self.pools.c128_fold):
            tensor[:, free] = torch.nan


@pytest.mark.parametrize("chunk", [1 << 20, 50])
@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("residue", [0, 1, 2, 3, 77])
def test_the_start_brings_back_the_mtp_window(window: int, residue: int, chunk: int) -> None:
    """Exact from the start that is said; with everything below poisoned and one token later, NaN."""
    cut = 512 + residue
    scene = Drafter(window, cut)
    start = replay_start(scene.model.config, cut, mtp=True)
    assert 0 < start <= cut - 1 - (window - 1) * (len(RATIOS) + 1)
    scene.poison()
    state = scene.replayed(cut, start, chunk)
    assert torch.equal(scene.rows(state, cut), scene.rows(scene.first, cut))
    state.close()
    if start == cut - 1 - (window - 1) * (len(RATIOS) + 1):  # the MTP window is what asks for most
        scene.poison()
        late = scene.replayed(cut, start + 1, chunk)
        assert scene.rows(late, cut).isnan().any()


def test_the_mtp_window_decides_somewhere() -> None:
    """Or the case above would never be tried."""
    config = model_of(32, *RATIOS).config
    starts = [replay_start(config, cut, mtp=True) for cut in (512, 513)]
    assert np.diff([replay_start(config, 512), starts[0]])[0] < 0
    assert starts[0] == 512 - 1 - 31 * 5
