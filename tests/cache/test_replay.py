"""Raw state rebuilt behind a chain equals that of a cold run to the bit, from the latest start that can do it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.cuts import cold, model_of, tokens_of
from support.replay import AFTER, Scene
from support.run import run, step
from weft.runtime.cache.base import replay_start
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import ModelConfig, preset


def check(scene: Scene, cut: int, start: int | None = None, chunk: int = 1 << 20) -> None:
    model = scene.model
    state = scene.behind(cut, replay_start(model.config, cut) if start is None else start)
    scene.replay(state, chunk)
    got = scene.logits_after(state)
    want = cold(model, len(scene.tokens))[cut - 1 : cut + AFTER]
    assert torch.equal(got, want), (cut, start)
    state.close()


@pytest.mark.parametrize("window", [8, 128])
def test_cuts_of_every_residue(window: int) -> None:
    model = model_of(window, 0, 4, 128, 4)
    length = 900
    scene = Scene(model, length)
    bound = 4 * (window - 1) + 1
    cuts = range(bound + 1, length - AFTER, 1 + 127 // 5)
    cuts = [*cuts, 256, 257, 511, 512, 640, 700, 701, 702, 703]
    for cut in cuts:
        if cut > bound:
            check(scene, cut)
    scene.first.close()
    scene.pools.check()


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("page", [1, 5, 64])
def test_replays_in_chunks(chunk: int, page: int) -> None:
    scene = Scene(model_of(8, 0, 4, 128, 4), 400, page)
    for cut in (150, 256, 333):
        check(scene, cut, chunk=chunk)


@pytest.mark.parametrize(
    "ratios", [(0,), (4,), (128,), (4, 128), (128, 4, 4), (128, 128, 0, 4), (4, 4, 4, 128, 0)]
)
@pytest.mark.parametrize("window", [8, 32, 128])
def test_the_start_is_the_latest_that_will_do(window: int, ratios: tuple[int, ...]) -> None:
    """With everything below poisoned, nothing that counts is NaN; one token later, something is."""
    model = model_of(window, *ratios)
    length = 300 + len(ratios) * window
    for cut in (length - AFTER, length - AFTER - 1, length - AFTER - 2, (length - AFTER) // 128 * 128):
        start = replay_start(model.config, cut)
        if start <= 0:
            continue
        scene = Scene(model, length)
        scene.poison()
        with np.errstate(invalid="ignore"):
            check(scene, cut)
            late = scene.behind(cut, start + 1)
            scene.poison()
            scene.replay(late)
            # A fold that began wrong shows in the logits only once its group is complete.
            fold = scene.pools.c128_fold[:, late.slot].clone()
            assert scene.logits_after(late).isnan().any() or fold.isnan().any(), (cut, start)


def test_a_start_at_0_is_a_cold_run() -> None:
    scene = Scene(model_of(8, 0, 4, 128, 4), 200)
    for cut in (1, 3, 4, 20, 28):
        assert replay_start(scene.model.config, cut) == 0
        check(scene, cut)


def test_replays_and_others_share_a_batch() -> None:
    model = model_of(8, 0, 4, 128, 4)
    scene = Scene(model, 400)
    other_tokens = tokens_of(400)[::-1]
    other = SequenceState(scene.pools)
    state = scene.behind(301, replay_start(model.config, 301))
    others = []
    for size in (5, 1, 30, 100, 64):
        work = [(other, other_tokens[other.length : other.length + size])]
        if state.behind:
            count = min(size, state.behind)
            work.insert(0, (state, scene.tokens[state.length : state.length + count]))
        others.append(step(model, work)[-1])
    assert not state.behind
    assert torch.equal(scene.logits_after(state), cold(model, 400)[300 : 301 + AFTER])
    assert torch.equal(model.logits(torch.cat(others)), run(model, other_tokens[: other.length]))


def test_the_chain_is_not_written() -> None:
    """Entries keep their bits even if the replayed tokens are wrong."""
    model = model_of(8, 0, 4, 128, 4)
    scene = Scene(model, 300)
    before = [rows.tensor.clone() for rows in (*scene.pools.kv, *scene.pools.index_keys)]
    state = scene.behind(290, replay_start(model.config, 290))
    base = scene.pools.base
    scene.tokens = [5] * 300
    scene.replay(state)
    for layer, (rows, old) in enumerate(zip((*scene.pools.kv, *scene.pools.index_keys), before, strict=True)):
        first = base["c4"] if layer < len(scene.pools.kv) else 0
        assert torch.equal(rows.tensor[first:], old[first:])


def test_the_published_bounds() -> None:
    flash, pro = ModelConfig(), preset("pro")
    for config, layers in ((flash, 43), (pro, 61)):
        for cut in (20_000, 20_037):
            assert cut - replay_start(config, cut) == 127 * layers + 1
            assert cut - replay_start(config, cut, mtp=True) == 127 * (layers + 1) + 1
