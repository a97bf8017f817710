"""Rows that are taken back leave no trace: what follows has the bits of a run that never saw them."""

from __future__ import annotations

import random

import pytest
import torch

from support.cuts import cold, model_of, tokens_of
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch
from weft.runtime.model.verify import TakeBack

RATIOS = (0, 4, 128, 4)
LENGTH = 300


@pytest.mark.parametrize("page", [1, 3, 32])
@pytest.mark.parametrize("window", [8, 128])
def test_any_number_of_drafts_at_any_place(window: int, page: int) -> None:
    """Two sequences in one batch; each step has right drafts, then wrong ones, and keeps the right ones."""
    model, tokens, want = model_of(window, *RATIOS), tokens_of(LENGTH), cold(model_of(window, *RATIOS), LENGTH)
    pools = Pools(model.config, PoolSizes(tokens=1024, slots=2, context=512, burst=512, page=page))
    states = [SequenceState(pools) for _ in range(2)]
    rng = random.Random(page + window)
    seen = 0
    while all(state.length < LENGTH - 8 for state in states):
        spans, ids, kept = [], [], []
        for state in states:
            right = rng.randint(1, 5)
            wrong = rng.randint(0, 5 - right)
            state.reserve(right + wrong)
            spans.append(state.span(right + wrong))
            ids += tokens[state.length : state.length + right] + rng.choices(range(3, 64), k=wrong)
            kept.append(right)
            seen += wrong
        batch = Batch(pools, spans, drafts=True)
        back = TakeBack(batch)
        streams = model.forward(torch.tensor(ids), batch).split([span.count for span in spans])
        for number, (state, count) in enumerate(zip(states, kept, strict=True)):
            start = state.length
            got = model.logits(streams[number][:count])
            assert torch.equal(got, want[start : start + count])
            back.keep(number, count, streams[number])
            state.commit(count)
            assert torch.equal(model.logits(pools.streams[[state.slot]])[0], want[state.length - 1])
    assert seen > 50
