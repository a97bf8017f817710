"""However a sequence begins behind what is known, it goes on with the bits of a cold run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from support.cuts import cold_last, model_of
from support.run import step
from weft.runtime.cache.base import replay_start
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.prefix import Plan, PrefixCache, replay_work
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.model import Model


class Scene:
    def __init__(self, model: Model, *, tokens: int = 8000, page: int = 8, checkpoints: int = 4) -> None:
        self.model = model
        sizes = PoolSizes(tokens=tokens, slots=4, context=2000, burst=600, page=page, checkpoints=checkpoints)
        self.pools = Pools(model.config, sizes)
        self.prefix = PrefixCache(self.pools)

    def begin(self, tokens: list[int], namespace: str = "") -> tuple[SequenceState, Plan]:
        return self.prefix.resume(tokens, namespace)

    def compute(self, state: SequenceState, tokens: list[int], chunk: int = 256) -> Tensor:
        """All of `tokens`; returns the logits of the last. Lets go of what is known where there is no room."""
        while state.length < len(tokens):
            count = min(chunk, state.behind or len(tokens) - state.length, len(tokens) - state.length)
            assert self.prefix.make_room(state, count)
            step(self.model, [(state, tokens[state.length : state.length + count])])
        return self.model.logits(self.pools.streams[state.slot : state.slot + 1])

    def finish(
        self, state: SequenceState, tokens: list[int], namespace: str = "", checkpoint: bool = True
    ) -> None:
        self.prefix.keep(tokens, state, namespace, checkpoint=checkpoint)
        state.close()
        self.prefix.check()


def cold(model: Model, tokens: list[int]) -> Tensor:
    return cold_last(model, tuple(tokens))


def some(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=count)


MODEL = (8, 0, 4, 128, 4)


def test_a_full_match_computes_nothing() -> None:
    scene = Scene(model_of(*MODEL))
    tokens = some(333)
    state, plan = scene.begin(tokens)
    assert plan == Plan(333, 0, "cold", 0, 333, "no_tokens")
    want = scene.compute(state, tokens)
    scene.finish(state, tokens)
    assert scene.prefix.plan(tokens) == Plan(333, 333, "checkpoint", 333, 0, "")
    again, plan = scene.begin(tokens)
    assert plan.work == 0 and again.length == 333 and not again.behind
    assert torch.equal(scene.compute(again, tokens), want)
    assert torch.equal(want, cold(scene.model, tokens))


def test_without_a_checkpoint_it_is_replayed() -> None:
    scene = Scene(model_of(*MODEL))
    tokens = some(400)
    state, _ = scene.begin(tokens)
    scene.compute(state, tokens)
    scene.finish(state, tokens, checkpoint=False)
    longer = tokens[:390] + some(25, 1)
    again, plan = scene.begin(longer)
    start = replay_start(scene.model.config, 390)
    assert (plan.matched, plan.way, plan.start, plan.reason) == (390, "replay", start, "no_checkpoint")
    assert plan.replayed == 390 - start
    assert plan.work == replay_work(scene.model.config, start, 390) + 25 < 415
    assert torch.equal(scene.compute(again, longer), cold(scene.model, longer))


def test_the_nearest_checkpoint_is_taken_if_it_is_cheaper() -> None:
    scene = Scene(model_of(128, 0, 4, 128, 4))  # replay takes 509 tokens here
    tokens = some(900)
    state, _ = scene.begin(tokens)
    for cut in (100, 700):
        scene.compute(state, tokens[:cut])
        scene.prefix.keep(tokens[:cut], state)
    scene.compute(state, tokens)
    scene.finish(state, tokens, checkpoint=False)
    for matched, way, start in ((750, "checkpoint", 700), (690, "replay", replay_start(scene.model.config, 690))):
        longer = tokens[:matched] + some(10, matched)
        again, plan = scene.begin(longer)
        assert (plan.way, plan.start, plan.reason) == (way, start, "no_checkpoint")
        assert torch.equal(scene.compute(again, longer), cold(scene.model, longer))
        again.close()


def test_namespaces_share_nothing() -> None:
    scene = Scene(model_of(*MODEL))
    tokens = some(300)
    state, _ = scene.begin(tokens, "a")
    scene.compute(state, tokens)
    scene.finish(state, tokens, "a")
    assert scene.prefix.plan(tokens, "b") == Plan(300, 0, "cold", 0, 300, "no_tokens")
    other, plan = scene.begin(tokens, "b")
    assert plan.way == "cold"
    assert torch.equal(scene.compute(other, tokens), cold(scene.model, tokens))
    scene.finish(other, tokens, "b")
    assert scene.prefix.plan(tokens, "a").work == scene.prefix.plan(tokens, "b").work == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_under_pressure(seed: int) -> None:
    """Prompts that share and branch, in pools that hold about three; every result is that of a cold run."""
    draw = random.Random(seed)
    model = model_of(draw.choice((8, 32)), 0, 4, 128, 4)
    scene = Scene(model, tokens=1000, page=draw.choice((1, 4, 16)), checkpoints=draw.choice((0, 1, 3)))
    known = [some(draw.randint(1, 300), 100 + seed)]
    ways = set()
    for turn in range(30):
        base = draw.choice(known)
        tokens = base[: draw.randint(0, len(base))] + some(draw.randint(1, 120), 1000 * seed + turn)
        tokens = tokens[:420]
        state, plan = scene.begin(tokens)
        ways.add(plan.way)
        assert torch.equal(scene.compute(state, tokens, draw.choice((7, 64, 300))), cold(model, tokens))
        scene.finish(state, tokens, checkpoint=draw.random() < 0.7)
        known.append(tokens)
    assert "replay" in ways or "checkpoint" in ways
    scene.prefix.clear()
    scene.prefix.check()
    for allocator in scene.pools.allocators.values():
        assert allocator.free == allocator.total
