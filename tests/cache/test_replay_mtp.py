"""The MTP block's window comes back with a replay too, if it begins one window earlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from support.cuts import model_of
from support.replay import Scene
from weft.runtime.cache.base import replay_start
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch

RATIOS = (0, 4, 128, 4)


class Drafter(Scene):
    """All of them run their MTP block too."""

    def __init__(self, window: int, length: int) -> None:
        super().__init__(model_of(window, *RATIOS), length + 1)
        self.first.close()
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
        state = self.behind(cut, start)
        self.run(state, cut, chunk)
        return state

    def rows(self, state: SequenceState, cut: int) -> Tensor:
        """The MTP window rows p-W .. p-2 of a state at p."""
        window, size = self.model.config.sliding_window, self.pools.sizes.page
        table = self.pools.tables["window"][state.slot]
        return self.pools.kv[-1].gather(
            torch.tensor([table[at // size] + at % size for at in range(cut - window, cut - 1)])
        )


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
