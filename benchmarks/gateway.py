"""What the gateway costs beside the engine it serves, and beside a server that does nothing.

streams: 64 at a time through HTTP, and the same by the engine's own calls within the server's process, turn by
turn: one core, in a process of its own, serves both, as two differ by a tenth on one machine. first byte: small
requests at a steady rate, with what the engine says they took subtracted, and the same to a bare aiohttp echo in
the same run. idle: memory of the server's process with streams that wait.
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
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, cast

import aiohttp
import uvloop

from support.record import record
from weft.gateway.cli import main as cli
from weft.gateway.cli import serve
from weft.gateway.http.state import State
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
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
def running(script: Seq[str], *options: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """A server that is ready."""
    command = [sys.executable, *script, "serve", "--port", str(port), "--threads", "1", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            for line in process.stderr:
                if line.strip() == "weft: ready":
                    break
            yield process
        finally:
            process.stdin.close()
            process.terminate()
            process.stderr.read()


@contextlib.contextmanager
def server(*options: str, port: int = 31877) -> Iterator[tuple[str, int]]:
    """Its address, and its process."""
    with running(("-c", SERVE), *options, port=port) as process:
        yield f"http://127.0.0.1:{port}", process.pid


# -- streams ------------------------------------------------------------------------------------------------


def prompt(number: int) -> list[int]:
    return [5 + (number * 31 + i * 7) % 200 for i in range(24)]


class Client(asyncio.Protocol):
    """One connection. It only keeps what comes, as what a client does with it is no cost of the gateway's."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(error or ConnectionResetError("the server left"))

    async def ask(self, body: bytes) -> None:
        """The whole answer is in `parts` then."""
        self.parts.clear()
        self._ended = asyncio.get_running_loop().create_future()
        head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        await self._ended

    def check(self) -> None:
        """An event for each token, one for the end, and the stream's own end."""
        events = b"".join(self.parts).split(b"data: ")[1:]
        assert len(events) == TOKENS + 2, len(events)
        assert f'"completion_tokens":{TOKENS},'.encode() in events[-2]
        assert events[-1].startswith(b"[DONE]")


async def by_http(clients: list[Client]) -> float:
    sampling = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    bodies = [
        json.dumps({"input_ids": prompt(number), "sampling_params": sampling, "stream": True}).encode()
        for number in range(STREAMS)
    ]
    began = time.perf_counter()
    await asyncio.gather(*(client.ask(body) for client, body in zip(clients, bodies, strict=True)))
    took = time.perf_counter() - began
    for client in clients:
        client.check()
    return took


async def by_engine(engine: Engine) -> float:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)

    async def one(number: int) -> None:
        drawn = 0
        with engine.open(prompt(number)) as sequence:
            async for event in sequence.generate(params):
                drawn += len(event.tokens) if isinstance(event, m.Delta) else 0
        assert drawn == TOKENS

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(STREAMS)))
    return time.perf_counter() - began


async def own_rounds(engine: Engine) -> None:
    """A round by the engine's calls for each line that comes; no KV is known before it, nor behind it."""
    while await asyncio.to_thread(sys.stdin.readline):
        engine.flush()
        took = await by_engine(engine)
        engine.flush()
        print(took, flush=True)


def serve_both() -> int:
    """`weft serve`, and `own_rounds` on its engine."""
    prepare, tasks = serve._prepare, []

    async def and_listen(state: State) -> None:
        await prepare(state)
        tasks.append(asyncio.ensure_future(own_rounds(state.engine)))

    serve._prepare = and_listen
    return cli()


async def both(process: subprocess.Popen[str], port: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of rounds by the engine's calls, and of those through HTTP, turn by turn; the first ones warm up."""
    assert process.stdin is not None and process.stdout is not None
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(STREAMS)]
    inside, outside = [], []
    for _ in range(rounds + 1):
        process.stdin.write("\n")
        process.stdin.flush()
        inside.append(float(await asyncio.to_thread(process.stdout.readline)))
        outside.append(await by_http(clients))
    for client in clients:
        client.transport.close()
    return inside[1:], outside[1:]


def streams(model: Path, rounds: int, port: int = 31877) -> dict[str, Any]:
    inside: list[float] = []
    outside: list[float] = []
    for _ in range(2):
        with running((__file__,), "--model", str(model), "--queue", "2048", port=port) as process:
            engine, http = uvloop.run(both(process, port, rounds))
            inside += engine
            outside += http
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
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve_both())
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
