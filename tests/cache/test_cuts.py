"""Going on from a cut equals a cold run: at every cut, in every way, together with others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cuts import cold, cold_last, model_of, tokens_of
from support.pairs import pairwise
from support.run import step
from weft.runtime.cache.base import replay_start
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.prefix import PrefixCache
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.model import Model

RATIOS = (0, 4, 128, 4)
LAST = 1200
AFTER = 9  # tokens computed behind a cut, in two pieces: more than two c4a groups


class Walk:
    """One sequence, walked along; others begin at its cuts."""

    def __init__(self, window: int) -> None:
        self.model = model_of(window, *RATIOS)
        self.tokens = tokens_of(LAST + AFTER)
        self.want = cold(self.model, LAST + AFTER)
        sizes = PoolSizes(
            tokens=2 * LAST + 512, slots=3, context=LAST + 64, burst=LAST + 64, page=8, checkpoints=2
        )
        self.pools = Pools(self.model.config, sizes)
        self.prefix = PrefixCache(self.pools)
        self.state = SequenceState(self.pools)

    def to(self, cut: int) -> None:
        if cut > self.state.length:
            self.run(self.state, cut - self.state.length)

    def run(self, state: SequenceState, count: int) -> Tensor:
        """What was kept at earlier cuts goes where there is no room: each has a page of its own."""
        assert self.prefix.make_room(state, count)
        (streams,) = step(self.model, [(state, self.tokens[state.length : state.length + count])])
        return streams

    def verify(self, cut: int) -> str:
        """Begin at the cut, and compute a few tokens; returns the way."""
        state, plan = self.prefix.resume(self.tokens[:cut])
        while state.behind:
            self.run(state, state.behind)
        streams = [self.pools.streams[state.slot : state.slot + 1].clone()]
        for count in (1, AFTER - 1):
            streams.append(self.run(state, count))
        assert torch.equal(self.model.logits(torch.cat(streams)), self.want[cut - 1 : cut + AFTER])
        state.close()
        return plan.way


def every(sample: int) -> list[Any]:
    """All cuts in the slow target, some in CI."""
    return [sample, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("by", every(29))
@pytest.mark.parametrize("window", [8, 128])
def test_checkpoints_at_every_cut(window: int, by: int) -> None:
    walk = Walk(window)
    for cut in range(1, LAST + 1, by):
        walk.to(cut)
        walk.prefix.keep(walk.tokens, walk.state)
        assert walk.verify(cut) == "checkpoint"
    walk.prefix.check()


@pytest.mark.parametrize("by", every(17))
@pytest.mark.parametrize("window", [8, 128])
def test_replays_at_every_cut_beyond_the_bound(window: int, by: int) -> None:
    walk = Walk(window)
    walk.to(LAST)
    walk.prefix.keep(walk.tokens, walk.state, checkpoint=False)
    bound = next(cut for cut in range(LAST) if replay_start(walk.model.config, cut) > 0)
    for cut in range(bound, min(bound + 600, LAST) + 1, by):
        assert walk.verify(cut) == "replay"


# -- together with others ------------------------------------------------------------------------------------

FACTORS = {
    "way": ("checkpoint", "replay", "forked", "evicted", "preempted", "near miss"),
    "chunk": (1, 3, 7, 64, 300),
    "batch": (1, 2, 5, 16, 32),
    "page": (1, 5, 16, 64),
    "residue": (0, 1, 2, 3, 64, 127),
    "window": (8, 32),
}
CASES = pairwise(FACTORS)
TAILS = [[], *(random.Random(i).choices(range(3, 64), k=count) for i, count in enumerate((1, 6, 40)))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_whoever_goes_on_together(case: dict[str, Any]) -> None:
    model, count = model_of(case["window"], *RATIOS), case["batch"]
    prompt = tokens_of(512 + case["residue"])
    sizes = PoolSizes(8192, count + 1, 1024, 4096, case["page"], checkpoints=count + 4)
    pools = Pools(model.config, sizes)
    prefix = PrefixCache(pools)
    first = SequenceState(pools)
    histories = [prompt + TAILS[i % len(TAILS)] for i in range(count)]
    states = began(case["way"], prefix, first, histories, model)
    assert len({state.slot for state in states}) == count
    while work := [pair for pair in zip(states, histories, strict=True) if pair[0].length < len(pair[1])]:
        part = []
        for state, history in work:
            size = min(case["chunk"], state.behind or len(history))
            part.append((state, history[state.length : state.length + size]))
        step(model, part)
    for state, history in zip(states, histories, strict=True):
        got = model.logits(pools.streams[state.slot : state.slot + 1])
        assert torch.equal(got, cold_last(model, tuple(history)))
        state.close()
    prefix.check()
    prefix.clear()
    assert all(allocator.free == allocator.total for allocator in pools.allocators.values())


def began(
    way: str, prefix: PrefixCache, first: SequenceState, histories: list[list[int]], model: Model
) -> list[SequenceState]:
    """States of the histories, begun in this way behind what `first` has computed of them; it is closed."""
    prompt = histories[0]
    if way == "near miss":  # it has parted from them before the end, and a state of shortly before that was kept
        step(model, [(first, prompt[:-9])])
        near = [loose for loose in [prefix.keep_near(first)] if loose is not None]
        other = prompt + TAILS[1] * 5
        step(model, [(first, other[first.length :])])
        prefix.keep(other, first, near=near)
        first.close()
        plans = [prefix.plan(history) for history in histories]
        assert {(plan.way, plan.start) for plan in plans} == {("checkpoint", len(prompt) - 9)}
        return [prefix.resume(history)[0] for history in histories]
    step(model, [(first, prompt)])
    if way == "forked":
        states = [first.fork() for _ in histories]
        first.close()
        return states
    prefix.keep(prompt, first, checkpoint=way != "replay")
    first.close()
    if way == "evicted":
        prefix.checkpoints.drop(prefix.checkpoints.held[0])
    states = [prefix.resume(history)[0] for history in histories]
    if way != "preempted":
        return states
    for state, history in zip(states, histories, strict=True):
        if len(history) > len(prompt) + 3:  # some way on
            step(model, [(state, history[state.length : state.length + 3])])
        prefix.keep(history, state)
        state.close()
    return [prefix.resume(history)[0] for history in histories]


def test_the_cases_cover_every_pair() -> None:
    assert len(CASES) < 60
    for case in CASES:
        assert case.keys() == FACTORS.keys()
    met = {(a, case[a], b, case[b]) for case in CASES for a in case for b in case}
    assert all(
        (a, x, b, y) in met for a in FACTORS for b in FACTORS if a != b for x in FACTORS[a] for y in FACTORS[b]
    )
