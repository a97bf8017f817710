"""Random requests with random cancellations and deadlines, while the core's process is killed again and again.

Every request has to end with a result or a typed error, and every slot and page has to come back, as does memory.

    python benchmarks/storm.py [--requests 1000] [--kills 12] [--seed 0] [--print]

A calm storm comes first, then one with kills. Memory is compared at rest, after the core has been warmed up.
`--print` writes no record. It exits with 1 if a request hangs or something is not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.config import preset
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import front
from weft.runtime.engine import messages as m
from weft.runtime.engine.child import CoreProcess
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.link import ProcessLink
from weft.runtime.errors import WeftError
from weft.runtime.text.tokenizer import byte_tokenizer_json

CONFIG = EngineConfig(
    pools=PoolSizes(tokens=8192, slots=24, context=2048, burst=256, page=16),
    limits=CoreLimits(chunk=128, queue=30, restarts=1000),
    threads=1,
)
AT_ONCE = 24
HUNG = 60.0  # seconds
ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


# -- a core that says what it holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class WatchedProcess(CoreProcess):
    """A truncation of sequence 0, which does not exist, is answered with what the core holds, as JSON."""

    def __call__(self, pipe: Connection) -> None:
        core: Any = import_module("weft.runtime.engine.core").Core

        class Watched(core):
            def handle(self, message: m.Request) -> None:
                if isinstance(message, m.Truncate) and message.sequence == 0:
                    stop = json.dumps(held(self))
                    self.emit(m.Done(call=message.call, usage=m.Usage(), length=0, stop=stop))
                else:
                    super().handle(message)

        import_module("weft.runtime.engine.host").Core = Watched
        super().__call__(pipe)


def held(core: Any) -> dict[str, int]:
    pools = core.pools
    pages = {f"{kind} pages": a.total - a.free for kind, a in pools.allocators.items()}
    counts = {"calls": len(core.calls), "sequences": len(core.sequences)}
    return {**counts, "slots": pools.sizes.slots - pools.free_slots, **pages, "rss": rss()}


def rss() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def at_rest(engine: front.Engine) -> dict[str, Any]:
    """What is held once nothing is asked any more; memory in MiB."""
    while engine._calls:
        await asyncio.sleep(0.01)
    engine.flush()
    done = await engine.result(lambda call: m.Truncate(call, 0, 0))
    found: dict[str, int] = json.loads(str(done.stop))
    memory = {"core_mib": found.pop("rss") / 2**20, "front_mib": rss() / 2**20}
    return {"held": found, **{name: round(value, 1) for name, value in memory.items()}}


# -- requests --------------------------------------------------------------------------------------------


async def plain(engine: front.Engine, draw: random.Random, deadline: float | None) -> None:
    prompt = "Once upon a time " * draw.randint(1, 30)
    params = SamplingParams(max_tokens=draw.choice((1, 5, 30, 100)), seed=1, ignore_eos=True)
    await engine.generate(prompt, params, deadline, prompt_logprobs=draw.choice((None, None, 2)))


async def samples(engine: front.Engine, draw: random.Random, deadline: float | None) -> None:
    params = SamplingParams(max_tokens=draw.choice((1, 20)), ignore_eos=True)
    await engine.sample("A fork " * draw.randint(1, 30), params, draw.randint(2, 4), deadline)


async def turns(engine: front.Engine, draw: random.Random, deadline: float | None) -> None:
    with engine.open("Two turns ") as sequence:
        for _ in range(2):
            sequence.extend("and more " * draw.randint(1, 20))
            await sequence.complete(SamplingParams(max_tokens=10, ignore_eos=True), deadline)
        await sequence.score([[97, 98], [99]], top=1, deadline=deadline)


async def request(engine: front.Engine, draw: random.Random) -> str:
    """A random request with a random fate; returns how it ended."""
    kind = draw.choice((plain, plain, plain, samples, turns))
    fate, short = draw.random(), draw.choice((0.001, 0.05, 0.3))
    try:
        async with asyncio.timeout(HUNG) as patience:
            if fate < 0.25:
                await kind(engine, draw, short)
            elif fate < 0.5:
                async with asyncio.timeout(short):
                    await kind(engine, draw, None)
            else:
                await kind(engine, draw, None)
    except TimeoutError:
        return "hung" if patience.expired() else "cancelled by its caller"
    except WeftError as error:
        return type(error).__name__
    return "done"


async def storm(engine: front.Engine, requests: int, kills: int, seed: int) -> dict[str, Any]:
    """The ends of the requests, and for each kill, at even distances, the times it took to be over."""
    draw = random.Random(seed)
    ends: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            ends[await request(engine, draw)] += 1

    started = time.monotonic()
    tasks = [asyncio.create_task(one()) for _ in range(requests)]
    deaths = []
    for i in range(kills):
        while ends.total() < requests * (i + 1) // (kills + 1):
            await asyncio.sleep(0.01)
        deaths.append(await kill(engine))
    await asyncio.gather(*tasks)
    figures: dict[str, Any] = {"ends": dict(sorted(ends.items())), "seconds": round(time.monotonic() - started, 1)}
    if deaths:
        figures["kills"] = kills
        for field in dataclasses.fields(Death):
            values = [getattr(death, field.name) for death in deaths]
            figures[field.name] = {"median": statistics.median(values), "max": max(values)}
    return figures


@dataclass(frozen=True)
class Death:
    """calls_waiting: when the core was killed. Times from then, in seconds: until the last of those calls had
    failed, and until a new call was answered."""

    calls_waiting: int
    all_failed_s: float
    served_again_s: float


async def kill(engine: front.Engine) -> Death:
    link = engine._link
    assert isinstance(link, ProcessLink) and link.process.pid is not None
    while not engine._calls:
        await asyncio.sleep(0)
    waiting = set(engine._calls)
    killed = time.monotonic()
    os.kill(link.process.pid, signal.SIGKILL)
    while not waiting.isdisjoint(engine._calls):
        await asyncio.sleep(0.0005)
    failed = time.monotonic()
    while True:
        try:
            await engine.generate("Once", ONE)
            break
        except WeftError:  # sent before the death was known, or the queue is full
            await asyncio.sleep(0.01)
    return Death(len(waiting), round(failed - killed, 4), round(time.monotonic() - killed, 3))


# -- the whole -------------------------------------------------------------------------------------------


async def both(engine: front.Engine, requests: int, kills: int, seed: int) -> dict[str, Any]:
    """Each storm between two rests. The core at the end of the second is another than at its beginning."""
    await storm(engine, max(10, requests // 5), 0, seed + 1)  # buffers and caches find their size
    figures: dict[str, Any] = {"requests": requests, "at_once": AT_ONCE, "before": await at_rest(engine)}
    for name, deaths in (("calm", 0), ("killed", kills)):
        figures[name] = await storm(engine, requests, deaths, seed)
        figures[f"after_{name}"] = await at_rest(engine)
    return figures


def problems(figures: dict[str, Any]) -> list[str]:
    found = []
    for name in ("calm", "killed"):
        ends, rest = figures[name]["ends"], figures[f"after_{name}"]
        if "hung" in ends or sum(ends.values()) != figures["requests"]:
            found.append(f"{name}: requests hang")
        if any(rest["held"].values()):
            found.append(f"{name}: still held: {rest['held']}")
        for part in ("front_mib", "core_mib"):
            if rest[part] > figures["before"][part] * 1.05 + 4:
                found.append(f"{name}: {part} grew from {figures['before'][part]} to {rest[part]}")
    if figures["killed"].get("all_failed_s", {"max": 0})["max"] >= 1:
        found.append("waiting calls heard of a death after more than a second")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    front.CoreProcess = WatchedProcess  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_dummy_checkpoint(path, preset("tiny"), 0, tokenizer_json=byte_tokenizer_json())
        with front.Engine(path, config=CONFIG, process=True) as engine:
            figures = asyncio.run(both(engine, args.requests, args.kills, args.seed))
    if args.print:
        print(json.dumps(figures))
    else:
        import_module("support.record").record("storm", figures)
    for problem in problems(figures):
        print(problem, file=sys.stderr)
    return bool(problems(figures))


if __name__ == "__main__":
    sys.exit(main())
