"""What running programs costs beside what the engine does: the executor, and sglang's interpreter in the same run.

    python benchmarks/executor.py [--programs 2000] [--states 10000] [--seconds 10]

The engine is a stand-in behind the real front (`support/stand_in.py`): 8 tokens take 20 ms, whatever else
runs. *Throughput*: 500 programs at a time, of one generation, and of eight with two forks, in turn
on the executor, on sglang's interpreter over Weft's backend and the same engine, and on its interpreter over a
backend that only sleeps (no tokens, no engine: what its threads alone cost). *Added latency*: programs of every
primitive arrive at random at half the executor's throughput; what a primitive takes beyond the engine's time.
*States*: so many programs that wait for a generation at the same time. *Cancelled*: all of them are cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend

from support.record import record
from support.stand_in import StandIn
from weft.backend.executor import ProgramExecutor, tool
from weft.backend.language import DeepSeekV4Backend
from weft.backend.template import DeepSeekV4Template

LATENCY, TOKENS, TOGETHER = 0.02, 8, 500
GEN: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}


@sgl.function
def one(s: Any, i: int) -> None:
    s += sgl.user(f"Question {i} of a thousand.") + sgl.assistant(sgl.gen("x", **GEN))


@sgl.function
def eight(s: Any, i: int) -> None:
    s += sgl.user(f"Question {i} of a thousand.") + sgl.assistant(sgl.gen("a", **GEN))
    for turn in range(2):
        forks = s.fork(3)
        for way, fork in enumerate(forks):
            fork += f"Way {way} of turn {turn}: " + sgl.gen("w", **GEN)
        forks.join()
    s += sgl.user("And?") + sgl.assistant(sgl.gen("b", **GEN))


class Asleep(BaseBackend):  # type: ignore[misc]
    """The least that a backend can do."""

    def __init__(self) -> None:
        super().__init__()
        self.chat_template = DeepSeekV4Template()

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        time.sleep(LATENCY)
        return " word" * TOKENS, {}


def by_executor(engine: StandIn, program: Any, count: int) -> float:
    async def work() -> None:
        with ProgramExecutor(engine, stall=60) as executor:
            results = await executor.batch(program, [{"i": i} for i in range(count)], concurrency=TOGETHER)
        failed = [result for result in results if isinstance(result, Exception)]
        assert not failed, failed[0]

    started = time.perf_counter()
    asyncio.run(work())
    return count / (time.perf_counter() - started)


def by_interpreter(backend: Any, program: Any, count: int) -> float:
    started = time.perf_counter()
    states = program.run_batch([{"i": i} for i in range(count)], backend=backend, num_threads=TOGETHER)
    seconds = time.perf_counter() - started
    assert not [state.error() for state in states if state.error() is not None]
    return count / seconds


def throughput(engine: StandIn, count: int, rounds: int) -> dict[str, Any]:
    rows = {}
    for name, program, own, others in (("one", one, count, count // 4), ("eight", eight, count // 4, count // 16)):
        found: dict[str, list[float]] = {"executor": [], "sglang": [], "sglang asleep": []}
        for _ in range(rounds):
            found["executor"].append(by_executor(engine, program, own))
            backend = DeepSeekV4Backend(engine)
            found["sglang"].append(by_interpreter(backend, program, max(others, TOGETHER // 2)))
            backend.shutdown()
            found["sglang asleep"].append(by_interpreter(Asleep(), program, own))
        rates = {peer: round(statistics.median(own), 1) for peer, own in found.items()}
        ratios = {
            f"ratio to {peer}": round(
                statistics.median(a / b for a, b in zip(found["executor"], own, strict=True)), 2
            )
            for peer, own in found.items()
            if peer != "executor"
        }
        rows[name] = {"programs a second": rates, **ratios}
    return rows


# -- added latency -----------------------------------------------------------------------------------------


@tool
async def nothing() -> str:
    return "nothing"


@sgl.function
def every(s: Any, i: int, note: Callable[[str, float, float], None]) -> None:
    def timed(name: str, engine: float, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        note(name, time.perf_counter() - began, engine)
        return result

    def read(state: Any, name: str, expression: Any) -> Any:
        state += expression
        return state[name]

    s += sgl.user(f"Question {i} of a thousand.")
    timed("gen", LATENCY, lambda: read(s, "x", sgl.gen("x", **GEN)))
    forks = timed("fork", 0.0, lambda: s.fork(3))
    forks += sgl.gen("w", **GEN)
    timed("join", LATENCY, forks.join)
    timed("select", LATENCY / 4, lambda: read(s, "y", sgl.select("y", ["yes", "no"])))
    timed("tool", 0.0, lambda: s.call(nothing))
    timed("gather", LATENCY, lambda: s.gather(*(lambda b: read(b, "z", sgl.gen("z", **GEN)) for _ in range(2))))


def added_latency(engine: StandIn, seconds: float) -> dict[str, Any]:
    """At half of what it can do, measured first."""
    seen: dict[str, list[float]] = {}

    def note(name: str, took: float, engine_time: float) -> None:
        seen.setdefault(name, []).append(took - engine_time)

    async def capacity() -> float:
        with ProgramExecutor(engine, stall=60) as executor:
            started = time.perf_counter()
            count = 600
            await executor.batch(every, [{"i": i, "note": lambda *_: None} for i in range(count)], concurrency=200)
            return count / (time.perf_counter() - started)

    async def arrivals(rate: float) -> int:
        draw, tasks, count = random.Random(1), set(), 0
        with ProgramExecutor(engine, stall=60) as executor:
            following = end = time.perf_counter()
            end += seconds
            while following < end:
                await asyncio.sleep(max(0.0, following - time.perf_counter()))
                task = asyncio.ensure_future(executor.run(every, count, note))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                count += 1
                following += draw.expovariate(rate)
            await asyncio.gather(*tasks)
        return count

    most = statistics.median(asyncio.run(capacity()) for _ in range(3))
    gc.collect()
    count = asyncio.run(arrivals(most / 2))
    cuts = {name: statistics.quantiles(own, n=100) for name, own in seen.items()}
    return {
        "programs a second at most": round(most, 1),
        "programs": count,
        "added ms": {
            name: {
                "p50": round(1e3 * own[49], 3),
                "p99": round(1e3 * own[98], 3),
                "max": round(1e3 * max(seen[name]), 3),
            }
            for name, own in cuts.items()
        },
    }


# -- many states -------------------------------------------------------------------------------------------


def rss_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def many_states(engine: StandIn, count: int) -> dict[str, Any]:
    """All wait at the same time; then all are cancelled, twice."""

    async def once() -> tuple[float, int, int]:
        with ProgramExecutor(engine, stall=60) as executor:
            tasks = [asyncio.ensure_future(executor.run(one, i)) for i in range(count)]
            while len(core.calls) < count:
                await asyncio.sleep(0.05)
            held, waiting = rss_mib(), len(core.calls)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return held, waiting, len(core.lengths) + len(core.calls) + len(asyncio.all_tasks()) - 1

    core: Any = engine._link
    latency, engine.latency = engine.latency, 3600.0
    gc.collect()
    before = rss_mib()
    rounds = []
    for _ in range(3):
        held, waiting, left = asyncio.run(once())
        gc.collect()
        rounds.append(
            {"waiting": waiting, "MiB held": round(held, 1), "MiB after": round(rss_mib(), 1), "left": left}
        )
    engine.latency = latency
    return {"MiB before": round(before, 1), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--states", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("error")
    logging.getLogger("weft.executor").setLevel(logging.ERROR)
    engine = StandIn(LATENCY, TOKENS)
    # As servers do: what exists at the start is never looked through for garbage again.
    gc.collect()
    gc.freeze()
    figures = {"states": many_states(engine, args.states)}
    figures["added latency"] = added_latency(engine, args.seconds)
    figures["throughput"] = throughput(engine, args.programs, args.rounds)
    record("executor", figures)


if __name__ == "__main__":
    main()
