"""A core in its own process: same results as in a thread, and what happens when it dies."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.engine import small_config
from support.tree import ROOT
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.engine.link import ProcessLink
from weft.runtime.errors import Cancelled, ConfigError, DeadlineExceeded, EngineDead
from weft.runtime.text.tokenizer import byte_tokenizer_json

CONFIG = EngineConfig(
    pools=PoolSizes(tokens=8192, slots=12, context=2048, burst=256, page=16),
    limits=CoreLimits(chunk=128, restarts=100),
    threads=1,
)
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
PROMPT = "Once upon a time "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_dummy_checkpoint(path, small_config(0, 4, 128, 4), 0, tokenizer_json=byte_tokenizer_json())
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, config=CONFIG, process=True) as engine:
        yield engine


def wait(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


def kill(engine: Engine) -> None:
    assert isinstance(engine._link, ProcessLink)
    pid = engine._link.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def everything(engine: Engine) -> Any:
    plain = await engine.generate(PROMPT, GREEDY)
    warm = await engine.generate(PROMPT * 20, SamplingParams(max_tokens=30, seed=7, top_p=0.9, logprobs=2))
    with engine.open(PROMPT) as sequence:
        scores = await sequence.score([[97, 98], [99]], top=1)
        child = (await sequence.fork())[0]
        child.extend("and then")
        forked = await child.complete(GREEDY)
        child.close()
    return plain.tokens, warm.tokens, warm.text, warm.logprobs, scores, forked.tokens


def test_a_process_gives_what_a_thread_gives(engine: Engine, checkpoint: Path) -> None:
    with Engine(checkpoint, config=CONFIG) as thread:
        assert wait(everything(engine)) == wait(everything(thread))


def test_among_cancelled_calls_and_on_other_pages(checkpoint: Path) -> None:
    """A process with pages of 1, where others come and go, gives the bits of a quiet thread with pages of 64."""

    async def leaving(engine: Engine, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await engine.sample(PROMPT * 9, ENDLESS, 2)

    async def crowded(engine: Engine) -> Any:
        others = [asyncio.create_task(leaving(engine, 0.01 + 0.03 * i)) for i in range(8)]
        found = await everything(engine)
        for task in others:
            await task
        return found

    def config(page: int) -> EngineConfig:
        return dataclasses.replace(CONFIG, pools=dataclasses.replace(CONFIG.pools, page=page, slots=30))

    with (
        Engine(checkpoint, config=config(1), process=True) as process,
        Engine(checkpoint, config=config(64)) as thread,
    ):
        assert wait(crowded(process)) == wait(everything(thread))


def test_a_dead_core_fails_waiting_calls_at_once_and_is_replaced(engine: Engine) -> None:
    async def story() -> None:
        expected = await engine.generate(PROMPT, GREEDY)
        sequence = engine.open(PROMPT)
        waiting = [asyncio.create_task(engine.generate(PROMPT * i, ENDLESS)) for i in range(1, 5)]
        await asyncio.sleep(0.3)
        kill(engine)
        for task in waiting:
            with pytest.raises(EngineDead, match="exit code -9"):
                await task
        with pytest.raises(EngineDead, match="lost"):
            await sequence.complete(GREEDY)
        assert (await engine.generate(PROMPT, GREEDY)).tokens == expected.tokens

    wait(story())


def test_deadlines_end_running_queued_and_prefilling_calls(engine: Engine) -> None:
    async def story() -> None:
        with engine.open(PROMPT) as sequence:
            running = asyncio.create_task(sequence.complete(ENDLESS))
            queued = asyncio.create_task(sequence.complete(GREEDY, deadline=0.1))
            prefilling = asyncio.create_task(engine.generate("x" * 2000, GREEDY, deadline=0.01))
            with pytest.raises(DeadlineExceeded):
                await queued
            with pytest.raises(DeadlineExceeded):
                await prefilling
            assert not running.done()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert (await engine.generate(PROMPT, GREEDY, deadline=60)).finish_reason == "length"

    wait(story())


def test_too_many_deaths_are_final(checkpoint: Path) -> None:
    config = EngineConfig(pools=CONFIG.pools, limits=CoreLimits(chunk=128, restarts=0), threads=1)

    async def story() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, ENDLESS))
        await asyncio.sleep(0.2)
        kill(engine)
        with pytest.raises(EngineDead):
            await task
        with pytest.raises(EngineDead):
            await engine.generate(PROMPT, GREEDY)

    with Engine(checkpoint, config=config, process=True) as engine:
        wait(story())


def test_closing_ends_waiting_calls(checkpoint: Path) -> None:
    engine = Engine(checkpoint, config=CONFIG, process=True)

    async def story() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, ENDLESS))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Cancelled):
            await task

    wait(story())
    with pytest.raises(EngineDead):
        engine.open(PROMPT)


def test_a_model_in_memory_cannot_move(engine: Engine) -> None:
    class Model:
        config = engine.model_config

    with pytest.raises(ConfigError, match="process"):
        Engine(Model(), engine.tokenizer, process=True)  # type: ignore[arg-type]


def test_the_front_of_a_process_does_not_import_torch() -> None:
    code = "import sys, weft.runtime.engine.front; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def storm(*options: str) -> None:
    """It checks by itself that nothing hangs or is left behind."""
    command = [sys.executable, str(ROOT / "benchmarks" / "storm.py"), "--print", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)
    assert figures["calm"]["ends"]["done"] > figures["requests"] // 20


def test_requests_with_random_ends_and_kills() -> None:
    storm("--requests", "12", "--kills", "1")


@pytest.mark.slow
def test_a_thousand_requests_with_random_ends_and_kills() -> None:
    storm("--requests", "1000", "--kills", "10")
