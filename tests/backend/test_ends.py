"""Readers that leave, backends that are shut down and engines that end: nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.choices import token_length_normalized

from support.engine import Gate, byte_tokenizer, is_idle, wait_for
from support.programs import POOLS, Rig, babbling_model, guarded, open_engine, rig
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Cancelled, EngineDead

GEN = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@sgl.function
def ask(s: Any, question: str, **options: Any) -> None:
    s += question
    s += sgl.gen("x", **{**GEN, **options})


@contextmanager
def failing() -> Iterator[None]:
    """Programs may fail inside: sglang warns of each, which here would be an error of its worker."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert all("Error in stream_executor" in str(warning.message) for warning in seen)


def kinds(states: list[Any]) -> set[type]:
    return set(guarded(lambda: [type(state.error()) for state in states]))


@contextmanager
def gated() -> Iterator[tuple[Gate, Engine]]:
    gate = Gate(babbling_model())
    with open_engine(gate) as engine:
        try:
            yield gate, engine
        finally:
            gate.open()


# -- leaving early -----------------------------------------------------------------------------------------


def streaming(own: Rig, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The backend's own stream, as the interpreter iterates it."""
    state = own.run(ask, "how long?", max_tokens=1)
    params = dataclasses.replace(state.stream_executor.default_sampling_para, ignore_eos=True, **options)
    pieces: Iterator[tuple[str, dict[str, Any]]] = own.backend.generate_stream(state.stream_executor, params)
    return pieces


def test_a_reader_that_leaves_cancels_the_generation() -> None:
    with rig() as own:
        core = own.engine._link.core
        pieces = streaming(own, max_new_tokens=900)
        for _ in range(3):
            assert next(pieces)[1]["completion_tokens"] < 50
        assert len(core.calls) == 1
        pieces.close()
        wait_for(lambda: not core.calls, seconds=10)
        own.backend.flush_cache()
        wait_for(lambda: is_idle(own.engine), seconds=10)
        again = streaming(own, max_new_tokens=5, temperature=0.0)
        text = "".join(piece for piece, _ in again)
        assert own.complete("how long?", max_tokens=6, ignore_eos=True).text.endswith(text) and text


def test_a_stream_that_is_never_read_costs_nothing() -> None:
    with rig() as own:
        streaming(own, max_new_tokens=900).close()
        assert not own.engine._link.core.calls


def test_a_program_whose_reader_left_ends_by_itself() -> None:
    """sglang does not tell the backend; the program runs on, and holds nothing when it has ended."""
    with rig() as own:
        state = ask.run("how long?", backend=own.backend, stream=True)
        assert guarded(lambda: next(state.text_iter()))
        wait_for(lambda: state.stream_executor.is_finished)
        assert state["x"] == own.complete("how long?", max_tokens=4, ignore_eos=True).text


# -- ends from outside -------------------------------------------------------------------------------------


def test_shutdown_ends_what_is_running() -> None:
    with gated() as (gate, engine), rig(engine) as own:
        gate.shut()
        states = [ask.run(f"number {i}?", backend=own.backend) for i in range(3)]
        wait_for(lambda: len(asyncio.all_tasks(own.backend._bridge._loop)) == 3)
        guarded(own.backend.shutdown)
        errors = guarded(lambda: [own.error(state) for state in states])
        assert [type(error) for error in errors] == [Cancelled] * 3
        gate.open()


def test_shutdown_ends_a_stream_with_an_error() -> None:
    """It must not look as if the text were complete."""
    with rig() as own:
        pieces = streaming(own, max_new_tokens=900)
        next(pieces)
        guarded(own.backend.shutdown)
        with pytest.raises(Cancelled):
            guarded(lambda: list(pieces))


def test_nothing_runs_after_shutdown() -> None:
    with rig() as own:
        state = own.run(ask, "before?")
        guarded(own.backend.shutdown)
        guarded(own.backend.shutdown)
        wait_for(lambda: is_idle(own.engine), seconds=10)
        assert isinstance(guarded(lambda: own.error(own.run(ask, "after?"))), EngineDead)
        executor = state.stream_executor
        params = executor.default_sampling_para
        for call in (
            own.backend.flush_cache,
            lambda: own.backend.cache_prefix("text"),
            lambda: own.backend.commit_lazy_operations(executor),
            lambda: own.backend.generate(executor, params),
            lambda: list(own.backend.generate_stream(executor, params)),
            lambda: own.backend.select(executor, ["a"], 0.0, token_length_normalized),
        ):
            with pytest.raises(EngineDead, match="shut down"):
                guarded(call)


def test_backends_on_one_engine_are_apart() -> None:
    with rig() as first, gated() as (_, engine), rig(engine) as own, rig(engine) as other:
        for each in (first, own, other):
            guarded(lambda each=each: each.run(ask, "shared?"))
        guarded(own.backend.shutdown)
        state = guarded(lambda: other.run(ask, "shared?"))
        assert state["x"] == first.complete("shared?", max_tokens=4, ignore_eos=True).text
        assert state.get_meta_info("x")["cached_tokens"] == len(other.prompt("shared?"))
        guarded(other.backend.shutdown)


class Faulty(Gate):
    """A gate that can be told to crash the core."""

    def __init__(self) -> None:
        super().__init__(babbling_model())
        self.crashes = 0

    def forward(self, *args: Any) -> Any:
        out = super().forward(*args)
        if self.crashes:
            self.crashes -= 1
            raise MemoryError("planted")
        return out


def engine_of(model: Faulty, restarts: int) -> Engine:
    config = EngineConfig(pools=POOLS, limits=CoreLimits(chunk=64, restarts=restarts))
    return Engine(model, byte_tokenizer(), config)


def test_a_core_that_is_replaced_loses_only_what_ran() -> None:
    """Held histories are gone with the core, their tokens are not: later programs are as if nothing had been."""
    model = Faulty()
    questions = ("one?", "two?", "three?")
    with failing(), engine_of(model, restarts=5) as engine:
        own = Rig(engine, babbling_model())
        before = [guarded(lambda q=q: own.run(ask, q))["x"] for q in questions[:2]]
        steps = len(model.steps)
        running = ask.run(questions[2], max_tokens=40, backend=own.backend)
        wait_for(lambda: len(model.steps) > steps + 3)
        model.crashes = 1
        assert kinds([running]) == {EngineDead}
        after = [guarded(lambda q=q: own.run(ask, q)) for q in questions]
        assert kinds(after) == {type(None)}
        texts = [own.complete(q, max_tokens=4, ignore_eos=True).text for q in questions]
        assert [state["x"] for state in after] == texts
        assert before == texts[:2]
        guarded(own.backend.shutdown)
        wait_for(lambda: is_idle(engine), seconds=10)


def test_a_core_that_dies_while_many_run() -> None:
    """Those computing a prompt are computed again, those generating fail; the next ones are well."""
    model = Faulty()
    batch = [{"question": f"number {i}?"} for i in range(12)]
    with failing(), engine_of(model, restarts=5) as engine:
        own = Rig(engine, babbling_model())
        guarded(lambda: ask.run_batch(batch[:6], backend=own.backend))
        model.crashes = 1
        states = guarded(lambda: ask.run_batch(batch, backend=own.backend))
        assert kinds(states) <= {type(None), EngineDead}
        states = guarded(lambda: ask.run_batch(batch, backend=own.backend))
        assert kinds(states) == {type(None)}
        for state, item in zip(states, batch, strict=True):
            assert state["x"] == own.complete(item["question"], max_tokens=4, ignore_eos=True).text
        guarded(own.backend.shutdown)
        wait_for(lambda: is_idle(engine), seconds=10)


def test_a_dead_engine_fails_every_program() -> None:
    model = Faulty()
    with failing(), engine_of(model, restarts=0) as engine:
        own = Rig(engine, babbling_model())
        guarded(lambda: own.run(ask, "before?"))
        model.crashes = 1
        states = [ask.run(f"number {i}?", backend=own.backend) for i in range(4)]
        assert kinds(states) == {EngineDead}
        assert kinds([ask.run("after?", backend=own.backend)]) == {EngineDead}
        guarded(own.backend.shutdown)


def test_an_engine_closed_under_a_backend() -> None:
    with failing(), gated() as (gate, engine):
        own = Rig(engine, babbling_model())
        states = [ask.run(f"number {i}?", max_tokens=900, backend=own.backend) for i in range(3)]
        wait_for(lambda: len(gate.steps) > 5)
        guarded(engine.close)
        assert kinds(states) <= {Cancelled, EngineDead}
        assert kinds([ask.run("after?", backend=own.backend)]) == {EngineDead}
        guarded(own.backend.flush_cache)
        guarded(own.backend.shutdown)
