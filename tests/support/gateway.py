"""A gateway that really listens, on an engine in this process, for clients of any kind."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from support.engine import byte_tokenizer, small_model
from weft.gateway.http.config import Bounds, ServeConfig
from weft.gateway.http.keys import Keys
from weft.gateway.http.server import Server
from weft.gateway.http.start import prepare
from weft.gateway.http.state import State
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine

T = TypeVar("T")

MODEL = "deepseek-v4"
SECONDS = 60.0


POOLS = PoolSizes(tokens=32768, slots=4, context=8192, burst=512)
LONG: dict[str, Any] = {"text": "x", "sampling_params": {"max_new_tokens": 6000, "ignore_eos": True}}
SHORT: dict[str, Any] = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


def small_engine() -> Engine:
    return Engine(small_model(), byte_tokenizer(), EngineConfig(pools=POOLS))


@dataclass
class Gateway:
    """A server on a loop of its own, in a thread."""

    server: Server
    loop: asyncio.AbstractEventLoop
    url: str

    @property
    def state(self) -> State:
        return self.server.state

    @property
    def engine(self) -> Engine:
        return self.state.engine

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SECONDS)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=SECONDS, **options)

    def post(self, path: str, body: Any) -> httpx2.Response:
        """For threads of their own."""
        with self.http() as client:
            return client.post(path, json=body)


@contextmanager
def serving(
    make: Callable[[], Engine],
    *,
    programs: Sequence[str] = (),
    keys: str = "",
    thinking: bool = False,
    names: Sequence[str] = (MODEL,),
    wait: bool = True,
    **bounds: Any,
) -> Iterator[Gateway]:
    """make: the engine, which the server closes. wait: until it serves."""
    config = ServeConfig(
        port=0,
        names=tuple(names),
        thinking=thinking,
        programs=tuple(programs),
        keys=Keys(keys),
        bounds=Bounds(**{"drain": 5.0, **bounds}),
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()
    server = Server(State(config), lambda progress: make(), prepare)

    def call(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(SECONDS)

    try:
        call(server.start())
        try:
            if wait:
                call(server.ready())
            yield Gateway(server, loop, f"http://127.0.0.1:{server.port}")
        finally:
            call(server.stop())
    finally:
        call(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# -- programs -----------------------------------------------------------------------------------------------


def run_program(client: httpx2.Client, name: str, arguments: Any = None, status: int = 200, **options: Any) -> Any:
    answer = client.post(f"/v1/programs/{name}/runs", json={"arguments": arguments or {}, **options})
    assert answer.status_code == status, answer.text
    return answer.json()


def inline(
    client: httpx2.Client, steps: list[Any], arguments: Any = None, status: int = 200, **options: Any
) -> Any:
    body = {"program": {"steps": steps}, "arguments": arguments or {}, **options}
    answer = client.post("/v1/runs", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def events_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    found = []
    for block in answer.iter_lines():
        if block.startswith("data: "):
            found.append(json.loads(block[6:]))
    return found


def gen(name: str, **options: Any) -> dict[str, Any]:
    return {"do": "gen", "name": name, "max_tokens": 16, "temperature": 0, **options}
