"""Several event loops, each in a thread of its own, share one engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.engine import SECONDS, Gate, drawn_again, finish, is_idle, running, some_tokens, wait_for
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine

PARAMS = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Results in order; the first exception is raised here."""
    results: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            results[number] = work[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert not thread.is_alive(), "a loop hangs"
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[i] for i in range(len(work))]


def test_each_loop_gets_its_own_answers() -> None:
    async def work(engine: Engine, number: int) -> None:
        for round in range(3):
            prompt = some_tokens(20 + 5 * number, seed=10 * number + round)
            with engine.open(prompt) as sequence:
                (child,), scores = await asyncio.gather(sequence.fork(), sequence.append_scored(prompt[:2]))
                assert [entry.token for entry in scores] == prompt[:2]
                with child:
                    output = await child.complete(PARAMS)
            assert output.tokens == drawn_again(prompt, output.tokens, PARAMS)

    with running() as engine:
        in_threads(*(lambda n=n: finish(work(engine, n)) for n in range(4)))


def test_one_sequence_may_move_between_loops() -> None:
    async def first() -> None:
        await sequence.complete(PARAMS)

    async def second() -> list[int]:
        return (await sequence.complete(PARAMS)).tokens

    prompt = some_tokens(30)
    with running() as engine, engine.open(prompt) as sequence:
        in_threads(lambda: finish(first()))
        (tokens,) = in_threads(lambda: finish(second()))
        whole = finish(engine.generate(prompt, SamplingParams(max_tokens=16, seed=1, ignore_eos=True))).tokens
        assert tokens == whole[8:]


def test_a_loop_that_ends_with_calls_open_disturbs_nobody() -> None:
    gate = Gate()

    async def leave(engine: Engine) -> None:
        calls = [
            asyncio.ensure_future(engine.generate(some_tokens(50), SamplingParams(max_tokens=400)))
            for _ in range(3)
        ]
        while len(gate.steps) < 3:
            await asyncio.sleep(0.001)
        assert not any(call.done() for call in calls)

    async def stay(engine: Engine) -> None:
        for seed in range(5):
            prompt = some_tokens(30, seed)
            output = await engine.generate(prompt, PARAMS)
            assert output.tokens == drawn_again(prompt, output.tokens, PARAMS)

    with running(gate) as engine:
        in_threads(lambda: finish(leave(engine)), lambda: finish(stay(engine)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_loop_closed_without_farewell_is_noticed() -> None:
    """Its pending call can be delivered to nobody; the core must not go on for it for ever."""
    gate = Gate()

    def leave() -> None:
        loop = asyncio.new_event_loop()
        stream = sequence.generate(SamplingParams(max_tokens=900, ignore_eos=True))
        loop.run_until_complete(anext(stream))
        streams.append(stream)  # kept alive, so that no finaliser cancels it
        loop.close()

    streams: list[Any] = []
    with running(gate) as engine:
        sequence = engine.open(some_tokens(30))
        in_threads(leave)
        wait_for(lambda: not engine._link.core.calls)
        steps = len(gate.steps)
        assert steps < 900
        assert len(finish(engine.generate([5], PARAMS)).tokens) == 8
        sequence.close()
        engine._calls.clear()  # the abandoned stream's own entry
        wait_for(lambda: is_idle(engine))
