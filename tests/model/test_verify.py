"""Rows that are taken back leave no trace: what follows has the bits of a run that never saw them."""

from __future__ import annotations

import random

import pytest
import torch

from support.cuts import cold, model_of, tokens_of
from support.run import pools_for, step
from weft.runtime.cache.base import replay_start
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
        back.apply()
        for state in states:
            assert torch.equal(model.logits(pools.streams[[state.slot]])[0], want[state.length - 1])
    assert seen > 50


def test_drafts_beside_a_replay() -> None:
    """The folds behind a draft's rows are noted, though the batch leaves out other rows from layer to layer."""
    model, tokens, want = model_of(8, *RATIOS), tokens_of(LENGTH), cold(model_of(8, *RATIOS), LENGTH)
    pools = pools_for(model, [tokens] * 3)
    drafting, replaying = SequenceState(pools), SequenceState(pools)
    step(model, [(drafting, tokens[:200])])
    cut, size = 190, pools.sizes.page
    chain = {
        kind: {n: drafting.pages[kind][n] for n in range(-(-(cut // ratio) // size))}
        for kind, ratio in (("c4", 4), ("c128", 128))
    }
    replaying.adopt(chain, cut)
    replaying.begin_replay(replay_start(model.config, cut))
    beside = 0
    while replaying.behind:
        drafting.reserve(3)
        count = min(3, replaying.behind)
        replaying.reserve(count)
        batch = Batch(pools, [replaying.span(count), drafting.span(3)], drafts=True)
        assert batch.replays
        back = TakeBack(batch)
        at = drafting.length
        ids = [*tokens[replaying.length : replaying.length + count], tokens[at], 3, 3]
        rows = model.forward(torch.tensor(ids), batch)[count:]
        back.keep(1, 1, rows)
        back.apply()
        replaying.commit(count)
        drafting.commit(1)
        beside += 1
    assert beside > 10
    assert drafting.length < 256 < LENGTH, "the group whose fold was taken back is not complete yet"
    rest = step(model, [(drafting, tokens[drafting.length :])])[0]
    assert torch.equal(model.logits(rest), want[-len(rest) :])
    assert torch.equal(model.logits(pools.streams[[replaying.slot]])[0], want[cut - 1])
