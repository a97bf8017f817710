"""Padded, captured and replayed steps: the bits that steps have which are as large as they need to be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from support import draw
from support.device import DEVICE, config_of, references, tokens_for
from support.run import pools_for, step
from weft.runtime.cache.base import Span
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch
from weft.runtime.model.cuda import shape
from weft.runtime.model.cuda.block import Block
from weft.runtime.model.cuda.graphs import Graphs
from weft.runtime.model.cuda.model import DeviceModel
from weft.runtime.model.verify import TakeBack


@pytest.fixture(autouse=True, scope="module")
def ops() -> Iterator[None]:
    with references():
        yield


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small steps are padded too."""
    monkeypatch.setattr(shape, "SIZES", (2, 4, 16, 64))


@cache
def models() -> tuple[DeviceModel, DeviceModel]:
    """The same weights with padded steps, on a GPU replayed, and without."""
    config = config_of(0)
    weights = draw.random_weights(config, 0)

    def make(graphs: bool) -> DeviceModel:
        return DeviceModel(config, weights, dtype=torch.float32, device=DEVICE, graphs=graphs)

    return make(True), make(False)


class Run:
    """A model with sequences of some lengths behind it."""

    def __init__(self, model: DeviceModel, lengths: tuple[int, ...]) -> None:
        self.model = model
        self.ids = [tokens_for(model, length + 60, length) for length in lengths]
        self.pools = pools_for(model, self.ids, 16, "fp8", "fp4")
        assert isinstance(self.pools, DevicePools)
        self.states = [SequenceState(self.pools) for _ in lengths]
        for state, ids, length in zip(self.states, self.ids, lengths, strict=True):
            step(model, [(state, ids[:length])])

    def decode(self, which: tuple[int, ...]) -> Tensor:
        """Streams of a step of one token each."""
        parts = [(self.states[i], self.ids[i][self.states[i].length : self.states[i].length + 1]) for i in which]
        return torch.cat(step(self.model, parts))

    def verify(self, counts: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
        """Streams of a step of several rows of each sequence, of which some are taken back."""
        spans, fed = [], []
        for state, ids, count in zip(self.states, self.ids, counts, strict=True):
            state.reserve(count)
            spans.append(state.span(count))
            fed += ids[state.length : state.length + count]
        batch = Batch(self.pools, spans, drafts=True)
        back = TakeBack(batch)
        h = self.model.forward(torch.tensor(fed), batch)
        for number, rows in enumerate(h.split(list(counts))):
            back.keep(number, kept[number], rows)
        back.apply()
        for state, count in zip(self.states, kept, strict=True):
            state.commit(count)
        return h

    def draft(self, depth: int) -> Tensor:
        """Logits of a chain of drafts."""
        h = self.pools.streams_of([state.slot for state in self.states])
        out = []
        for behind in range(depth):
            spans = [Span(state.slot, state.length - 1 + behind, 1) for state in self.states]
            ids = torch.tensor([ids[state.length] for state, ids in zip(self.states, self.ids, strict=True)])
            h = self.model.forward_mtp(h, ids, Batch(self.pools, spans))
            out.append(self.model.mtp_logits(h))
        return torch.cat(out)

    def memory(self) -> list[Tensor]:
        """All that the pools hold, but the raw state of slots that nobody has."""
        slots = [state.slot for state in self.states]
        pages = [pages.bytes for pages in (*self.pools.pages, *self.pools.key_pages)]
        return [*pages, self.pools.c4_tail[:, slots], self.pools.c128_fold[:, slots], self.pools.streams[slots]]


def both(lengths: tuple[int, ...], work: Callable[[Run], Tensor]) -> None:
    """The same results, and the same bytes behind them, to the bit."""
    padded, exact = (Run(model, lengths) for model in models())
    got, want = work(padded), work(exact)
    assert torch.equal(got, want)
    for a, b in zip(padded.memory(), exact.memory(), strict=True):
        assert torch.equal(a, b)
    assert padded.model._steps[padded.pools] and exact.pools not in exact.model._steps


@pytest.mark.parametrize("lengths", [(30,), (5, 127, 33), (3, 7, 150, 31, 64)])
def test_padding_changes_no_bit_of_a_decode_step(lengths: tuple[int, ...]) -> None:
    """Through entries of both kinds, with and without the indexer; a batch that shrinks."""
    everyone, some = tuple(range(len(lengths))), tuple(range(0, len(lengths), 2))

    def work(run: Run) -> Tensor:
        rows = torch.cat([run.decode(everyone), run.decode(everyone), run.decode(some), run.decode(everyone)])
        return run.model.logits(rows)

    both(lengths, work)


def test_padding_changes_no_bit_of_a_verify_step() -> None:
    """Of unequal numbers of rows; what is taken back leaves the state as it was."""

    def work(run: Run) -> Tensor:
        rows = [run.verify((2, 4, 1), (1, 3, 1)), run.verify((4, 4, 4), (4, 1, 2)), run.decode((0, 1, 2))]
        return run.model.logits(torch.cat(rows))

    both((126, 30, 6), work)


def test_padding_changes_no_bit_of_a_chain_of_drafts() -> None:
    both((40, 9, 70), lambda run: run.draft(3))


def test_few_steps_are_held_for_many() -> None:
    padded = models()[0]
    run = Run(padded, (33, 34, 35))
    for _ in range(20):
        run.decode((0, 1, 2))
    assert len(padded._steps[run.pools]) <= 4  # prefill has none; contexts of 64 and 128, sequences padded to 4
    before = len(padded._steps)
    pools = run.pools
    del run
    assert pools in padded._steps and len(padded._steps) == before
    del pools
    assert len(padded._steps) == before - 1, "graphs go with the pools they were captured over"


def test_steps_are_prepared_on_nothing() -> None:
    """Nobody's state is touched, and no decode step is new afterwards."""
    padded, exact = (Run(model, (40, 9, 70)) for model in models())
    assert padded.model.prepare(padded.pools) == len(padded.model._steps[padded.pools])
    before = len(padded.model._steps[padded.pools])
    for a, b in zip(padded.memory(), exact.memory(), strict=True):
        assert torch.equal(a, b)
    for which in ((0,), (0, 1, 2), (1, 2)):
        assert torch.equal(padded.decode(which), exact.decode(which))
    assert len(padded.model._steps[padded.pools]) == before
    assert exact.model.prepare(exact.pools) == 0


# -- what runs them ------------------------------------------------------------------------------------


def test_first_it_runs_and_is_captured_then_it_is_replayed() -> None:
    """Inputs are written before each run, into the same buffers; results are the capture's own."""
    log: list[str] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        log.append("capture")
        out = run()
        return lambda: log.append("replay"), out

    def function(x: Tensor) -> Tensor:
        log.append(f"run {x.tolist()}")
        return 2 * x

    graphs = Graphs(capture, most=2)

    def run(key: str, value: float) -> Tensor:
        return graphs.run(key, lambda: torch.zeros(1), lambda x: x.fill_(value), function)

    assert run("a", 1.0).item() == 2.0
    assert log == ["run [1.0]", "capture", "run [1.0]"]
    held = run("a", 5.0)
    assert log[3:] == ["replay"] and run("a", 6.0) is held
    run("b", 1.0)
    run("a", 1.0)
    run("c", 1.0)  # b was not used for longest
    log.clear()
    run("a", 1.0)
    assert log == ["replay"] and len(graphs) == 2
    run("b", 1.0)
    assert log[1:] == ["run [1.0]", "capture", "run [1.0]"]


def test_without_capture_it_runs_on_the_same_buffers() -> None:
    graphs = Graphs(None, most=4)
    seen: list[int] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.data_ptr())
        return x + 1

    for value in (1.0, 2.0, 3.0):
        out = graphs.run(0, lambda: torch.zeros(3), lambda x, value=value: x.fill_(value), function)
        assert (out == value + 1).all()
    assert len(set(seen)) == 1


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's thread may capture a step while another one asks the same model for something."""
    inside: list[Block] = []
    together: list[bool] = []
    run: Callable[..., object] = Block.__call__

    def alone(block: Block, *args: object) -> object:
        together.append(bool(inside))
        inside.append(block)
        time.sleep(0.002)
        out = run(block, *args)
        inside.remove(block)
        return out

    runs = [Run(models()[0], (20,)), Run(models()[0], (30,))]
    monkeypatch.setattr(Block, "__call__", alone)
    threads = [threading.Thread(target=lambda own=own: [own.decode((0,)) for _ in range(3)]) for own in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 6 * len(models()[0].blocks) and not any(together)


# -- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.gpu
def test_a_replayed_step_waits_for_nothing() -> None:
    """Torch raises an error for every operation that it knows to wait."""
    run = Run(models()[0], (40, 30))
    rows = run.decode((0, 1))
    run.model.logits(rows)
    run.verify((2, 2), (1, 1))
    for state in run.states:
        state.reserve(1)
    batch = Batch(run.pools, [state.span(1) for state in run.states])
    ids = torch.tensor([3, 4])
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.model.logits(run.model.forward(ids, batch))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_step_is_replayed_on_a_gpu() -> None:
    """The second step of a shape launches one graph, not its kernels."""
    run = Run(models()[0], (40,))
    run.decode((0,))
    (held,) = run.model._steps[run.pools]._held.values()
    assert held.replay is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.decode((0,))
    launches = [event for event in profile.events() if "cudaGraphLaunch" in event.name]
    assert len(launches) <= 1 and len(run.model._steps[run.pools]) == 1
