"""What the gateway costs beside the engine it serves, and beside a server that does nothing.

streams: 64 at a time through HTTP, and the same by the engine's own calls, turn by turn; the engine runs in a
process of its own both times. first byte: small requests at a steady rate, with what the engine says they took
subtracted, and the same to a bare aiohttp echo in the same run. idle: memory of the server's process with streams
that wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from support.record import record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine

SERVE = "import sys; from weft.gateway.cli import main; sys.exit(main())"
ECHO = """
import sys, uvloop
from aiohttp import web
async def echo(request):
    return web.Response(body=await request.read(), content_type="application/json")
app = web.Application()
app.router.add_post("/echo", echo)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None,
loop=uvloop.new_event_loop())
"""
STREAMS, TOKENS = 64, 128


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@contextlib.contextmanager
def server(*options: str, port: int = 31877) -> Iterator[tuple[str, int]]:
    """Its address, and its process."""
    command = [sys.executable, "-c", SERVE, "serve", "--port", str(port), "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.strip() == "weft: ready":
                    break
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.stderr.read()


# -- streams ------------------------------------------------------------------------------------------------


def prompt(number: int) -> list[int]:
    return [5 + (number * 31 + i * 7) % 200 for i in range(24)]


async def by_http(url: str, rounds: int) -> list[float]:
    connector = aiohttp.TCPConnector(limit=0)
    times = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        sampling = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        body = {"input_ids": prompt(number), "sampling_params": sampling, "stream": True}
        async with session.post("/generate", json=body) as answer:
            assert answer.status == 200
            last = b""
            async for raw in answer.content.iter_any():
                last = raw
            assert last.endswith(b"data: [DONE]\n\n")

    async with aiohttp.ClientSession(url, connector=connector) as session:
        for _ in range(rounds + 1):
            async with session.post("/flush_cache"):
                pass
            began = time.perf_counter()
            await asyncio.gather(*(one(session, i) for i in range(STREAMS)))
            times.append(time.perf_counter() - began)
    return times[1:]


async def by_engine(engine: Engine, rounds: int) -> list[float]:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)
    times = []

    async def one(number: int) -> None:
        with engine.open(prompt(number)) as sequence:
            async for event in sequence.generate(params):
                assert not isinstance(event, m.Failed)

    for _ in range(rounds + 1):
        engine.flush()
        began = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(STREAMS)))
        times.append(time.perf_counter() - began)
    return times[1:]


def streams(model: Path, rounds: int) -> dict[str, Any]:
    """A round each in turn would hold two engines at a time on few cores: rounds of one, then of the other, then
    of the first again."""
    limits = CoreLimits(queue=4096)
    config = EngineConfig(pools=PoolSizes(), limits=limits, threads=1)
    inside: list[float] = []
    outside: list[float] = []
    for _ in range(2):
        with Engine(model, config=config, process=True) as engine:
            inside += uvloop.run(by_engine(engine, rounds))
        with server("--model", str(model), "--queue", "2048") as (url, _):
            outside += uvloop.run(by_http(url, rounds))
    engine_s, http_s = statistics.median(inside), statistics.median(outside)
    return {
        "streams": STREAMS,
        "tokens each": TOKENS,
        "engine s": [round(t, 3) for t in inside],
        "http s": [round(t, 3) for t in outside],
        "overhead": round(http_s / engine_s - 1, 4),
    }


# -- first bytes --------------------------------------------------------------------------------------------


async def paced(seconds: float, rate: float) -> AsyncIterator[int]:
    began, number = time.perf_counter(), 0
    while number < seconds * rate:
        wait = began + number / rate - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        yield number
        number += 1


async def first_bytes(url: str, echo: str, seconds: float, rate: float) -> dict[str, Any]:
    """Of both servers, turn by turn, each at the rate."""
    found: dict[str, list[float]] = {"gateway": [], "engine": [], "added": [], "echo": []}
    asked = {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}

    async def gateway(session: aiohttp.ClientSession) -> None:
        began = time.perf_counter()
        async with session.post(f"{url}/generate", json=asked) as answer:
            took = time.perf_counter() - began
            receipt = (await answer.json())["meta_info"]["receipt"]
        found["gateway"].append(took)
        found["engine"].append(receipt["total"])
        found["added"].append(took - receipt["total"])

    async def bare(session: aiohttp.ClientSession) -> None:
        began = time.perf_counter()
        async with session.post(f"{echo}/echo", json=asked) as answer:
            found["echo"].append(time.perf_counter() - began)
            await answer.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for ask in (gateway, bare, gateway, bare):
            tasks = []
            async for _ in paced(seconds, rate):
                tasks.append(asyncio.ensure_future(ask(session)))
            await asyncio.gather(*tasks)
    return {
        name: {"p50 ms": round(1000 * statistics.median(own), 2), "p99 ms": round(1000 * percentile(own, 0.99), 2)}
        for name, own in found.items()
    }


def small_requests(model: Path, seconds: float, rate: float) -> dict[str, Any]:
    with (
        server("--model", str(model)) as (url, _),
        subprocess.Popen([sys.executable, "-c", ECHO, "31878"]) as echo,
    ):
        try:
            time.sleep(2)
            found = uvloop.run(first_bytes(url, "http://127.0.0.1:31878", seconds, rate))
        finally:
            echo.terminate()
    return {"requests/s": rate, "seconds each": 2 * seconds, **found}


# -- idle streams -------------------------------------------------------------------------------------------


def rss_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def wait_idle(url: str, process: int, count: int) -> dict[str, Any]:
    """Streams that have been told that they are alive, and wait for their turn behind a few that draw."""
    before = rss_mib(process)
    body = {"model": "deepseek-v4", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body |= {"ignore_eos": True, "max_tokens": 3000, "min_tokens": 3000}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        answers = await asyncio.gather(*(session.post("/v1/chat/completions", json=body) for _ in range(count)))
        alive = sum(answer.status == 200 for answer in answers)
        await asyncio.sleep(5)
        held = rss_mib(process)
        for answer in answers:
            answer.close()
    await asyncio.sleep(3)
    async with aiohttp.ClientSession(url) as session, session.get("/server_info") as answer:
        left = (await answer.json())["internal_states"][0]["calls"]
    return {
        "streams": alive,
        "MiB before": round(before, 1),
        "MiB held": round(held, 1),
        "KiB each": round(1024 * (held - before) / count, 1),
        "MiB after": round(rss_mib(process), 1),
        "calls left": left,
    }


def idle(model: Path, count: int) -> dict[str, Any]:
    options = ("--queue", str(2 * count), "--slots", "4", "--keepalive", "2", "--context", "4096")
    with server("--model", str(model), *options) as (url, process):
        return uvloop.run(wait_idle(url, process, count))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--idle", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        made = [sys.executable, "-c", SERVE, "checkpoint", "tiny", str(tiny)]
        subprocess.run(made, check=True, capture_output=True)
        figures: dict[str, Any] = {"embedded, streams": streams(EMBEDDED, args.rounds)}
        print(json.dumps(figures))
        figures["tiny, first byte"] = small_requests(tiny, args.seconds, args.rate)
        figures["embedded, first byte"] = small_requests(EMBEDDED, args.seconds, args.rate)
        print(json.dumps(figures))
        figures["idle streams"] = idle(EMBEDDED, args.idle)
    record("gateway", figures)


if __name__ == "__main__":
    main()
