"""Engines that are small, or die."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sglang as sgl

from support.engine import core_of, finish, is_empty, until
from support.executor import GEN, check
from support.programs import POOLS, babbling_model, byte_tokenizer
from weft.backend.executor import ProgramExecutor, Run
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine


@sgl.function
def busy(s: Any, number: int) -> Any:
    s += f"{number} once " + sgl.gen("x", **GEN)
    forks = s.fork(3)
    forks += lambda i: f"{i}" + sgl.gen("y", **GEN)
    s += sgl.select("z", ["one", "two", "three"])
    forks.join()
    parts = s.gather(lambda b: b.__iadd__(sgl.gen("w", **GEN)) and None, lambda b: None)
    s += parts[0]["w"] + sgl.gen("v", **GEN)


def outcomes(pools: PoolSizes, queue: int, count: int, dies_at: int | None = None) -> list[Any]:
    limits = CoreLimits(chunk=pools.burst, queue=queue)

    async def work() -> list[Any]:
        with Engine(babbling_model(), byte_tokenizer(), EngineConfig(pools=pools, limits=limits)) as engine:
            if dies_at is not None:
                core, taken = core_of(engine), 0
                step = core.step

                def deadly() -> None:
                    nonlocal taken
                    taken += 1
                    if taken == dies_at:
                        raise RuntimeError("boom")
                    step()

                core.step = deadly  # type: ignore[method-assign]
            with ProgramExecutor(engine) as executor:
                runs = await executor.batch(busy, [{"number": n % 7} for n in range(count)])
            await until(lambda: is_empty(engine))
            return [(run.text(), run.state.lane.variables) if isinstance(run, Run) else run for run in runs]

    return finish(work())


def test_more_calls_than_a_queue_holds_wait_their_turn() -> None:
    roomy = outcomes(POOLS, 1024, 7)
    small = PoolSizes(tokens=2048, slots=4, context=1024, burst=256, page=16)
    assert outcomes(small, 32, 70) == roomy * 10


@pytest.mark.parametrize("step", [1, 2, 4, 9, 20, 31])
def test_a_run_goes_on_when_a_core_dies(step: int) -> None:
    assert outcomes(POOLS, 1024, 3, dies_at=step) == outcomes(POOLS, 1024, 3)


def test_an_engine_that_stays_dead_fails_its_runs() -> None:
    async def work() -> None:
        engine = Engine(
            babbling_model(), byte_tokenizer(), EngineConfig(pools=POOLS, limits=CoreLimits(chunk=256, restarts=0))
        )

        def deadly() -> None:
            raise RuntimeError("boom")

        core_of(engine).step = deadly  # type: ignore[method-assign]
        with ProgramExecutor(engine) as executor:
            (ended,) = await asyncio.wait_for(executor.batch(busy, [{"number": 1}]), 20)
        assert "EngineDead" in str(ended)
        engine.close()

    check(work())
