"""A restored raw state goes on with the bits of a cold run, at any cut."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from support.cuts import cold, model_of, tokens_of
from support.run import step
from weft.runtime.cache.capacity import Capacity, PoolSizes
from weft.runtime.cache.checkpoints import Checkpoint, Checkpoints
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.radix import CHAIN_KINDS, RadixTree, as_tokens
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.model import Model

LENGTH = 700


class Scene:
    """A sequence that leaves checkpoints on its way and its chain in a tree, and then closes."""

    def __init__(self, model: Model, cuts: list[int], page: int = 16) -> None:
        self.model = model
        self.tokens = tokens_of(LENGTH)
        sizes = PoolSizes(
            tokens=6 * LENGTH, slots=4, context=2 * LENGTH, burst=LENGTH, page=page, checkpoints=len(cuts)
        )
        self.pools = Pools(model.config, sizes)
        self.checkpoints = Checkpoints(self.pools)
        self.tree = RadixTree(self.pools.allocators, page)
        self.saved: dict[int, Checkpoint] = {}
        state = SequenceState(self.pools)
        for cut in sorted({*cuts, LENGTH}):
            if cut > state.length:
                step(model, [(state, self.tokens[state.length : cut])])
            if cut in cuts:
                self.saved[cut] = self.checkpoints.save(state, cut)
        self.tree.insert(as_tokens(self.tokens), state.pages)
        state.close()
        self.checkpoints.check()

    def resumed(self, cut: int, match: int) -> SequenceState:
        state = SequenceState(self.pools)
        found = self.tree.match(as_tokens(self.tokens[:match]))
        assert found.length == match
        state.adopt(self.tree.pages(found), match)
        self.checkpoints.restore(self.saved[cut], state)
        return state

    def go_on(self, state: SequenceState, tokens: list[int], sizes: tuple[int, ...]) -> Tensor:
        """Logits of the token before the state's length and of those behind it."""
        streams = [self.pools.streams[state.slot : state.slot + 1].clone()]
        for turn in range(len(tokens)):
            part = tokens[state.length : state.length + sizes[turn % len(sizes)]]
            if state.behind:
                part = part[: state.behind]
            if not part:
                break
            streams += step(self.model, [(state, part)])
        return self.model.logits(torch.cat(streams))


def few_cuts(seed: int, count: int = 24) -> list[int]:
    return sorted({1, 3, 4, 5, 127, 128, 129, 256, LENGTH, *random.Random(seed).sample(range(1, LENGTH), count)})


@pytest.mark.parametrize("window", [8, 128])
@pytest.mark.parametrize("page", [1, 7, 32])
def test_every_kind_of_cut_goes_on_as_if_cold(window: int, page: int) -> None:
    model = model_of(window, 0, 4, 128, 4)
    scene = Scene(model, few_cuts(page), page)
    want = cold(model, LENGTH)
    for cut in scene.saved:
        state = scene.resumed(cut, cut)
        assert not state.behind
        got = scene.go_on(state, scene.tokens[: cut + 70], (1, 3, 50))
        assert torch.equal(got, want[cut - 1 : cut + 70])
        state.close()


def test_the_chain_may_be_longer_than_the_cut() -> None:
    model = model_of(8, 0, 4, 128, 4)
    scene = Scene(model, few_cuts(3))
    want = cold(model, LENGTH)
    before = [rows.tensor.clone() for rows in scene.pools.index_keys]  # type: ignore[attr-defined]
    for cut in scene.saved:
        for match in (min(cut + 1, LENGTH), min(cut + 130, LENGTH)):
            state = scene.resumed(cut, match)
            assert state.behind == match - cut
            got = scene.go_on(state, scene.tokens[: match + 20], (64, 5, 1))
            assert torch.equal(got, want[cut - 1 : match + 20])
            state.close()
    held = {n for node in scene.tree.nodes() for n in node.pages["c4"].values()}
    for rows, old in zip(scene.pools.index_keys, before, strict=True):
        for page in held:
            part = slice(page * 16, (page + 1) * 16)
            assert torch.equal(rows.tensor[part], old[part])  # type: ignore[attr-defined]


def test_other_tokens_behind_a_cut_leave_it_as_it_was() -> None:
    model = model_of(8, 0, 4, 128, 4)
    scene = Scene(model, [301])
    want = cold(model, LENGTH)
    for seed in range(3):
        state = scene.resumed(301, 301)
        other = scene.tokens[:301] + random.Random(seed).choices(range(3, 64), k=90)
        scene.go_on(state, other, (7, 1))
        again = scene.resumed(301, 301)
        assert torch.equal(scene.go_on(again, scene.tokens[:400], (40,)), want[300:400])
        state.close()
        again.close()


def test_dropped_ones_give_everything_back() -> None:
    scene = Scene(model_of(8, 0, 4, 128, 4), few_cuts(5))
    allocator = scene.pools.allocators["window"]
    while scene.checkpoints.held:
        scene.checkpoints.drop(scene.checkpoints.least())
        scene.checkpoints.check()
    assert allocator.free == allocator.total
    for kind in CHAIN_KINDS:
        own = scene.pools.allocators[kind]
        assert scene.tree.evict(kind, own.total)
    scene.pools.check()


def test_what_is_used_stays_and_what_saves_little_goes() -> None:
    scene = Scene(model_of(8, 0, 4, 128, 4), [100, 300, 500])
    first, second, third = scene.saved.values()
    assert scene.checkpoints.least() is first  # the oldest, and it saves least
    for _ in range(5):
        scene.resumed(100, 100).close()
    assert scene.checkpoints.least() is second
    scene.checkpoints.drop(second)
    assert scene.checkpoints.least() in (first, third)


def test_capacity_counts_the_checkpoints() -> None:
    model = model_of(8, 0, 4, 128, 4)
    for checkpoints in (0, 1, 5):
        sizes = PoolSizes(tokens=1000, slots=3, context=500, burst=64, page=8, checkpoints=checkpoints)
        pools = Pools(model.config, sizes)
        assert pools.nbytes == Capacity(model.config, sizes).total
