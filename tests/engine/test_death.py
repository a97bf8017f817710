"""A core that crashes takes its calls with it, says so at once, and is replaced a few times."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from support.engine import Gate, core_of, drawn_again, finish, running, some_tokens, stop, until, wait_for
from weft.runtime.cache.pools import Pools
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Cancelled, EngineDead
from weft.runtime.model import model

PROMPT = some_tokens(40, seed=6)
PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


async def all_fail(calls: list[asyncio.Future[Any]], match: str) -> None:
    for call in calls:
        with pytest.raises(EngineDead, match=match):
            await call


async def crash(engine: Engine, gate: Gate, fault: BaseException) -> list[asyncio.Future[Any]]:
    """Calls of every kind, running and queued, met by `fault`."""
    gate.shut()
    sequence = engine.open(PROMPT)
    calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(engine.generate(PROMPT, PARAMS)) for _ in range(3)]
    calls += [asyncio.ensure_future(sequence.fork(2)), asyncio.ensure_future(sequence.append_scored([5, 6]))]
    await until(lambda: bool(gate.steps))
    await asyncio.sleep(0.01)
    gate.fault = fault
    gate.open()
    return calls


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError("boom"), SystemExit("boom")])
def test_every_waiting_call_hears_of_it(fault: BaseException) -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        await all_fail(await crash(engine, gate, fault), "boom")

    with running(gate, leaks=True) as engine:
        finish(work(engine))


def test_later_calls_on_a_dead_engine_fail_at_once() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        sequence = engine.open(PROMPT)
        await all_fail(await crash(engine, gate, RuntimeError("boom")), "boom")
        with pytest.raises(EngineDead, match="boom"):
            engine.open(PROMPT)
        with pytest.raises(EngineDead, match="boom"):
            sequence.extend([5])
        for call in (
            sequence.complete(PARAMS),
            sequence.fork(),
            sequence.append_scored([5]),
            sequence.truncate(5),
        ):
            with pytest.raises(EngineDead, match="boom"):
                await call
        sequence.close()

    with running(gate, leaks=True) as engine:
        finish(work(engine))
        stop(engine)
        with pytest.raises(EngineDead):
            engine.open(PROMPT)


def test_a_fault_between_steps_is_a_crash_too() -> None:
    class NoLogits(Gate):
        def logits(self, streams: Any) -> Any:
            raise RuntimeError("boom")

    async def work(engine: Engine) -> None:
        with pytest.raises(EngineDead, match="boom"):
            await engine.generate(PROMPT, PARAMS)

    with running(NoLogits(), leaks=True) as engine:
        finish(work(engine))


def test_a_new_core_takes_over_without_the_old_sequences() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        old = engine.open(some_tokens(40, seed=7))
        await old.complete(PARAMS)
        await all_fail(await crash(engine, gate, RuntimeError("boom")), "boom")
        output = await engine.generate(PROMPT, PARAMS)
        assert output.tokens == drawn_again(PROMPT, output.tokens, PARAMS)
        with pytest.raises(EngineDead, match="lost"):
            await old.complete(PARAMS)
        old.extend([5])
        old.close()

    with running(gate, restarts=1) as engine:  # and nothing of the old core is left to leak
        finish(work(engine))


def test_after_its_last_restart_an_engine_stays_dead() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        for _ in range(3):
            await all_fail(await crash(engine, gate, RuntimeError("boom")), "boom")
            gate.steps.clear()
        with pytest.raises(EngineDead, match="boom"):
            await engine.generate(PROMPT, PARAMS)

    with running(gate, restarts=2, leaks=True) as engine:
        finish(work(engine))


def test_a_core_that_cannot_be_replaced_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("no pools")

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(model, "Pools", no_memory)
        await all_fail(await crash(engine, gate, RuntimeError("boom")), "boom|no pools")
        with pytest.raises(EngineDead):
            await engine.generate(PROMPT, PARAMS)

    with running(gate, restarts=3, leaks=True) as engine:
        finish(work(engine))


def test_the_memory_of_a_dead_core_is_free_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools take most of a machine: two of them would not fit."""
    gate = Gate()
    alive: list[bool] = []

    def make(*args: Any, **kwargs: Any) -> Pools:
        gc.collect()
        alive.append(old() is not None)
        return Pools(*args, **kwargs)

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(model, "Pools", make)
        await all_fail(await crash(engine, gate, RuntimeError("boom")), "boom")
        assert len((await engine.generate(PROMPT, PARAMS)).tokens) == 6

    with running(gate, restarts=1) as engine:
        old = weakref.ref(core_of(engine).pools)
        finish(work(engine))
    assert alive == [False]


def test_messages_sent_meanwhile_are_answered() -> None:
    """Calls made between the crash and its discovery reach the new core, or fail; none is lost."""
    gate = Gate()

    async def work(engine: Engine) -> None:
        calls = await crash(engine, gate, RuntimeError("boom"))
        late = [asyncio.ensure_future(engine.generate(PROMPT, PARAMS)) for _ in range(3)]
        await all_fail(calls, "boom")
        for result in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(result, EngineDead) or len(result.tokens) == 6

    with running(gate, restarts=1) as engine:
        finish(work(engine))


# -- an orderly end --------------------------------------------------------------------------------------


def test_closing_the_engine_ends_waiting_calls() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        calls = [asyncio.ensure_future(engine.generate(PROMPT, PARAMS)) for _ in range(3)]
        await until(lambda: bool(gate.steps))
        closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
        await asyncio.sleep(0.01)
        gate.open()
        for call in calls:
            with pytest.raises(Cancelled, match="the engine was closed"):
                await call
        await closing
        engine.close()

    with running(gate, leaks=True) as engine:
        finish(work(engine))


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_calls_made_while_the_engine_closes_do_not_hang(delay: float) -> None:
    async def calling(engine: Engine) -> None:
        with pytest.raises((Cancelled, EngineDead)):
            while True:
                await engine.generate(PROMPT[:4], SamplingParams(max_tokens=1))

    async def work(engine: Engine) -> None:
        calls = [asyncio.ensure_future(calling(engine)) for _ in range(4)]
        await asyncio.sleep(delay)
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        await asyncio.gather(*calls)

    with running(leaks=True) as engine:
        finish(work(engine))


def test_a_call_overtaken_by_the_end_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread closes the engine just before the message is handed over."""

    async def work(engine: Engine) -> None:
        send = engine._link.send

        def late(message: Any) -> None:
            if not isinstance(message, m.Generate):
                send(message)
                return
            monkeypatch.setattr(engine._link, "send", send)
            closing = threading.Thread(target=engine.close)
            closing.start()
            closing.join(0.5)  # or waits for us
            send(message)
            closing_threads.append(closing)

        closing_threads: list[threading.Thread] = []
        monkeypatch.setattr(engine._link, "send", late)
        with pytest.raises((Cancelled, EngineDead)):
            await engine.generate(PROMPT, PARAMS)
        closing_threads[0].join()

    with running(leaks=True) as engine:
        finish(work(engine))


def test_a_context_manager_closes() -> None:
    with running(leaks=True) as engine:
        with engine as same:
            assert same is engine
        with pytest.raises(EngineDead, match="closed"):
            engine.open(PROMPT)
        wait_for(lambda: engine._closed)
