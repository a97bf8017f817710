"""The model on device tensors beside the one on the host: the same numbers, whatever the kind of step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch

from support import draw
from support.device import (
    DEVICE,
    assert_follows,
    assert_same_but_for_rounding,
    config_of,
    logits_of,
    on_device,
    pair,
    references,
    streams_of,
    tokens_for,
)
from support.pools import poison
from support.run import pools_for, step
from weft.runtime.cache.base import Span, replay_start
from weft.runtime.cache.capacity import Capacity, IndexFormat, PageKind, PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.errors import ConfigError
from weft.runtime.model.base import Network
from weft.runtime.model.batch import Batch
from weft.runtime.model.cuda import compressor
from weft.runtime.model.cuda.model import DeviceModel
from weft.runtime.model.verify import TakeBack
from weft.runtime.model.weights import Draining

SEEDS = range(6)


@pytest.fixture(autouse=True, scope="module")
def ops() -> Iterator[None]:
    with references():
        yield


def test_the_configs_cover_what_they_should() -> None:
    configs = [config_of(seed) for seed in SEEDS]
    assert {kind for config in configs for kind in config.layer_kinds} == {"window", "c4a", "c128a"}
    assert {config.sliding_window for config in configs} == {32, 128}
    assert any(config.index_topk < 180 // 4 for config in configs)
    assert any(config.num_hash_layers for config in configs)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_are_those_of_the_host(seed: int) -> None:
    host, device = pair(seed)
    ids = tokens_for(host, 180, seed)
    want = logits_of(host, ids)
    assert_follows(logits_of(device, ids), want)
    assert_follows(logits_of(device, ids, (64, 1, 1, 5, 31), page=7), want)


@pytest.mark.parametrize("quantity", ["sliding_window", "index_topk", "routed_scaling_factor"])
def test_a_planted_difference_is_seen(quantity: str) -> None:
    """The comparison would notice a model that is slightly another one."""
    config = config_of(0)
    value = getattr(config, quantity)
    other = dataclasses.replace(config, **{quantity: value - 1 if isinstance(value, int) else value * 1.01})
    weights = draw.random_weights(config, 0)
    ids = tokens_for(pair(0)[0], 150)
    with pytest.raises(AssertionError):
        assert_follows(logits_of(on_device(other, weights), ids), logits_of(pair(0)[0], ids))


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_long_enough_for_several_entries_of_128(seed: int) -> None:
    host, device = pair(seed)
    ids = tokens_for(host, 400, seed)
    assert_follows(logits_of(device, ids, (300, 1)), logits_of(host, ids))


@pytest.mark.parametrize("page", [1, 5, 64])
@pytest.mark.parametrize("chunks", [(1,), (3, 50, 2)])
def test_chunks_and_pages_change_nothing(chunks: tuple[int, ...], page: int) -> None:
    """Up to rounding: references compute in float64 within a step, and keep float32 between steps."""
    _, device = pair(0)
    ids = tokens_for(device, 140, 1)
    assert_same_but_for_rounding(logits_of(device, ids, chunks, page), logits_of(device, ids))


@pytest.mark.parametrize("chunks", [(150,), (139, 4, 7)])
def test_scores_are_made_a_few_rows_at_a_time(chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered keys in prefill, pages in decode; an index of more rows than fit changes nothing."""
    _, device = pair(0)
    ids = tokens_for(device, 150)
    want = logits_of(device, ids, chunks)
    monkeypatch.setattr(compressor, "_SCORES", 1)
    assert torch.equal(logits_of(device, ids, chunks), want)


def test_sequences_together_are_as_each_alone() -> None:
    _, device = pair(0)
    sequences = [tokens_for(device, length, length) for length in (1, 4, 63, 129, 140)]
    chunks = [1, 3, 20, 129, 64]
    pools = pools_for(device, sequences, 16, "fp8", "fp4")
    states = [SequenceState(pools) for _ in sequences]
    out: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(state.length < len(ids) for state, ids in zip(states, sequences, strict=True)):
        work = [i for i, state in enumerate(states) if state.length < len(sequences[i])]
        parts = [(states[i], sequences[i][states[i].length : states[i].length + chunks[i]]) for i in work]
        for i, rows in zip(work, step(device, parts), strict=True):
            out[i].append(rows)
    for ids, parts in zip(sequences, out, strict=True):
        assert_same_but_for_rounding(device.logits(torch.cat(parts)), logits_of(device, ids))


@pytest.mark.parametrize("keys", ["fp8", "fp4"])
def test_key_formats_choose_nearly_the_same_entries(keys: IndexFormat) -> None:
    """Beside a run that sees all entries: choosing changes the logits little, in either format."""
    _, device = pair(1)
    ids = tokens_for(device, 150)
    chosen = logits_of(device, ids, keys=keys)
    other = logits_of(device, ids, keys="fp4" if keys == "fp8" else "fp8")
    assert (chosen.argmax(1) == other.argmax(1)).float().mean() > 0.8
    assert (
        chosen[: 4 * device.config.index_topk + 3] - other[: 4 * device.config.index_topk + 3]
    ).abs().max() < 1e-4


def test_bfloat16_follows_float32() -> None:
    wide, narrow = pair(0)[1], pair(0, torch.bfloat16)[1]
    ids = tokens_for(wide, 150)
    a, b = logits_of(wide, ids), logits_of(narrow, ids)
    assert (a - b).abs().mean() < 0.15
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.8


def mtp_in_pieces(model: Network, ids: list[int], streams: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """MTP streams of all rows but the last, beside the backbone's steps; `streams` are the backbone's."""
    state = SequenceState(pools_for(model, [ids], 16, "fp8", "fp4"))
    out = []
    for size in pieces:
        start, end = state.length, state.length + size
        state.reserve(size)
        model.forward(torch.tensor(ids[start:end]), Batch(state.pools, [state.span(size)]))
        first = max(0, start - 1)
        if end - 1 > first:
            batch = Batch(state.pools, [Span(state.slot, first, end - 1 - first)])
            rows = streams[first : end - 1].to(state.pools.device)
            out.append(model.forward_mtp(rows, torch.tensor(ids[first + 1 : end]), batch))
        state.commit(size)  # only now may window rows go
    return torch.cat(out)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mtp_block_is_that_of_the_host(seed: int) -> None:
    host, device = pair(seed)
    ids = tokens_for(host, 100, seed)
    streams = streams_of(host, ids)
    want = host.mtp_logits(mtp_in_pieces(host, ids, streams, [100]))
    for pieces in ([100], [40, 1, 1, 58]):
        got = device.mtp_logits(mtp_in_pieces(device, ids, streams, pieces))
        assert_follows(got, want)


def test_forks_copy_what_they_write_and_read_only_their_own() -> None:
    """What nobody holds is NaN before each step."""
    _, device = pair(0)
    prefix = tokens_for(device, 75)
    pools = pools_for(device, [prefix] * 8, 16, "fp8", "fp4")
    parent = SequenceState(pools)
    poison(pools)
    start = step(device, [(parent, prefix)])[0]
    branches = [parent, parent.fork(), parent.fork()]
    tails = [tokens_for(device, 60, seed) for seed in (1, 2, 3)]
    rows = [[start] for _ in branches]
    for at in range(0, 60, 20):
        poison(pools)
        work = [(state, tail[at : at + 20]) for state, tail in zip(branches, tails, strict=True)]
        for own, part in zip(rows, step(device, work), strict=True):
            own.append(part)
    assert pools.copied > 2 * pools.raw_bytes
    for own, tail in zip(rows, tails, strict=True):
        assert_same_but_for_rounding(device.logits(torch.cat(own)), logits_of(device, prefix + tail))
    for state in branches:
        state.close()
    pools.check()


def chain_of(state: SequenceState, cut: int) -> dict[PageKind, dict[int, int]]:
    """The entry pages of its first `cut` tokens."""
    kinds: tuple[tuple[PageKind, int], ...] = (("c4", 4), ("c128", 128))
    return {kind: {n: state.pages[kind][n] for n in range(-(-(cut // ratio) // 16))} for kind, ratio in kinds}


@pytest.mark.parametrize("cut", [64, 149])
def test_a_replay_gives_the_state_of_a_cold_run(cut: int) -> None:
    """Behind a chain that another sequence has; rows before the replay are NaN."""
    _, device = pair(1)
    ids = tokens_for(device, 180)
    want = logits_of(device, ids)
    pools = pools_for(device, [ids] * 3, 16, "fp8", "fp4")
    first = SequenceState(pools)
    step(device, [(first, ids[:170])])
    state = SequenceState(pools)
    state.adopt(chain_of(first, cut), cut)
    state.begin_replay(replay_start(device.config, cut))
    poison(pools)
    while state.behind:
        count = min(50, state.behind)
        step(device, [(state, ids[state.length : state.length + count])])
    streams = [pools.streams[state.slot : state.slot + 1].clone()]
    streams += step(device, [(state, ids[cut : cut + 1])]) + step(device, [(state, ids[cut + 1 : 180])])
    assert_same_but_for_rounding(device.logits(torch.cat(streams)), want[cut - 1 :])


def test_state_goes_to_another_slot_and_back() -> None:
    """As checkpoints keep it."""
    _, device = pair(0)
    ids = tokens_for(device, 150)
    pools = pools_for(device, [ids] * 2, 16, "fp8", "fp4")
    state = SequenceState(pools)
    step(device, [(state, ids[:77])])
    saved = pools.sizes.raw - 1
    pools.copy_raw(state.slot, saved)
    for tensor in (pools.c4_tail[:, state.slot], pools.c128_fold[:, state.slot], pools.streams[state.slot]):
        tensor.fill_(torch.nan)
    pools.copy_raw(saved, state.slot)
    rest = step(device, [(state, ids[77:])])[0]
    assert_same_but_for_rounding(device.logits(rest), logits_of(device, ids)[77:])


@pytest.mark.parametrize("keys", ["fp8", "fp4"])
def test_pools_take_what_capacity_counts(keys: IndexFormat) -> None:
    _, device = pair(0)
    sizes = PoolSizes(tokens=500, slots=3, context=300, burst=100, page=7)
    pools = device.make_pools(sizes, "fp8", keys)
    assert isinstance(pools, DevicePools)
    assert pools.nbytes == Capacity(device.config, sizes, 4, "fp8", keys).total
    with pytest.raises(ConfigError, match="released layouts"):
        device.make_pools(sizes, "model", keys)
    with pytest.raises(ConfigError, match="released layouts"):
        device.make_pools(sizes, "fp8", "model")


def test_weights_are_let_go_one_by_one() -> None:
    """Each is asked for once, so that a loader need not keep them."""
    config = config_of(2)
    weights = Draining(dict(draw.random_weights(config, 2)))
    DeviceModel(config, weights, dtype=torch.float32, device=DEVICE)
    assert not list(weights)


def test_drafts_are_taken_back() -> None:
    """Two sequences in one batch; each step has right drafts, then wrong ones, and keeps the right ones."""
    _, device = pair(0)
    ids = tokens_for(device, 140)
    want = logits_of(device, ids)
    pools = pools_for(device, [ids] * 2, 16, "fp8", "fp4")
    states = [SequenceState(pools) for _ in range(2)]
    step(device, [(states[0], ids[:115]), (states[1], ids[:60])])
    rng = random.Random(0)
    while states[0].length < 132:
        right = [rng.randint(1, 4) for _ in states]
        wrong = [rng.randint(0, 4 - count) for count in right]
        spans, fed = [], []
        for state, good, bad in zip(states, right, wrong, strict=True):
            state.reserve(good + bad)
            spans.append(state.span(good + bad))
            fed += ids[state.length : state.length + good] + tokens_for(device, bad, state.length)
        batch = Batch(pools, spans, drafts=True)
        back = TakeBack(batch)
        rows = device.forward(torch.tensor(fed), batch).split([span.count for span in spans])
        for number, (state, good) in enumerate(zip(states, right, strict=True)):
            back.keep(number, good, rows[number])
            got = device.logits(rows[number][:good])
            assert_same_but_for_rounding(got, want[state.length : state.length + good])
            state.commit(good)
        back.apply()


def test_drafts_beside_a_replay() -> None:
    """A batch that leaves out rows from layer to layer notes the folds behind a draft's rows all the same."""
    _, device = pair(1)
    ids, cut, at = tokens_for(device, 265), 190, 205
    pools = pools_for(device, [ids] * 3, 16, "fp8", "fp4")
    drafting, replaying = SequenceState(pools), SequenceState(pools)
    step(device, [(drafting, ids[:at])])
    replaying.adopt(chain_of(drafting, cut), cut)
    replaying.begin_replay(replay_start(device.config, cut))
    while replaying.behind:
        count = min(3, replaying.behind)
        drafting.reserve(3)
        replaying.reserve(count)
        batch = Batch(pools, [replaying.span(count), drafting.span(3)], drafts=True)
        assert batch.replays
        back = TakeBack(batch)
        fed = [*ids[replaying.length : replaying.length + count], ids[drafting.length], 3, 4]
        rows = device.forward(torch.tensor(fed), batch)[count:]
        back.keep(1, 1, rows)
        back.apply()
        replaying.commit(count)
        drafting.commit(1)
    assert at + 20 < drafting.length < 256, "the group whose fold was taken back is not complete yet"
    want = logits_of(device, ids)
    rest = step(device, [(drafting, ids[drafting.length :])])[0]
    assert_same_but_for_rounding(device.logits(rest), want[-len(rest) :])
    assert_same_but_for_rounding(device.logits(pools.streams[[replaying.slot]]), want[cut - 1 : cut])
