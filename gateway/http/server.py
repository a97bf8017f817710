"""The server: binds at once, loads the model behind it, serves, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from aiohttp import web

from weft.gateway.http import errors
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.config import is_loopback
from weft.gateway.http.errors import Fault, HttpError, fault
from weft.gateway.http.keys import Caller
from weft.gateway.http.state import State
from weft.gateway.http.table import ROUTES
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Overloaded

_log = logging.getLogger("weft.gateway")
_EVERYONE = Caller()
MakeEngine = Callable[[Callable[[int, int, str], None]], Engine]


class Server:
    """Serves one engine. `run` until a signal, or `start` and `stop` on a loop of the caller's."""

    def __init__(self, state: State, make: MakeEngine, prepare: Callable[[State], Awaitable[None]]) -> None:
        """make: the engine, in a thread, told whom to tell of progress; it is closed by the server. prepare: what
        is done once it is there, before anything is served."""
        self.state, self._make, self._prepare = state, make, prepare
        state.routes = ROUTES
        self._runner: web.AppRunner | None = None
        self._loading: asyncio.Task[None] | None = None
        self._hurried = False  # what is under way has no more time
        self.port = 0

    async def start(self) -> None:
        """Bind, and begin to load."""
        app = web.Application(client_max_size=1 << 62)  # each route bounds its own
        for route in ROUTES:
            app.router.add_route(route.method, route.path, partial(self._serve, route))
        app.middlewares.append(self._unrouted)
        # A client that leaves cancels its handler, wherever it waits.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None, keepalive_timeout=75.0
        )
        await self._runner.setup()
        config = self.state.config
        site = web.TCPSite(self._runner, config.host, config.port, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._loading = asyncio.get_running_loop().create_task(self._load())

    async def ready(self) -> None:
        """Wait until it serves; raises what went wrong."""
        assert self._loading is not None
        await asyncio.shield(self._loading)

    async def stop(self) -> None:
        """Let in nothing new, give what is under way its time, end the rest."""
        state = self.state
        state.stage = "draining"
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait({self._loading})
        if state.known_engine is not None:
            state.gate.closed = True
            until = time.monotonic() + state.config.bounds.drain
            while (state.gate.under_way or state.tasks) and time.monotonic() < until and not self._hurried:
                await asyncio.sleep(0.02)
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if state.known_engine is not None:
            state.sessions.clear()
            state.close()
            await asyncio.to_thread(state.known_engine.close)

    async def run(self, told: Callable[[str], None]) -> None:
        """Until SIGTERM or SIGINT; a second one ends what is under way at once. told: of each stage."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self._hurried = ended.is_set()
            ended.set()

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, stop)
        await self.start()
        told(f"listening on http://{self.state.config.host}:{self.port}, loading")
        waiting = loop.create_task(ended.wait())
        ready = loop.create_task(self.ready())
        try:
            await asyncio.wait({waiting, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await ready
                told("ready")
            await waiting
            told("draining")
        finally:
            waiting.cancel()
            ready.cancel()
            await self.stop()

    async def _load(self) -> None:
        state = self.state
        state.stage = "loading"

        def progress(done: int, total: int, shard: str) -> None:
            state.progress = f"{shard}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB"

        making = asyncio.ensure_future(asyncio.to_thread(self._make, progress))
        try:
            engine = await asyncio.shield(making)
            state.begin(engine)
            await engine.stats()  # which a process answers once it has its weights
            state.stage = "warming"
            await self._prepare(state)
            state.stage = "ready"
        except BaseException as error:
            state.failure = error
            if state.known_engine is None:
                making.add_done_callback(_close_late)
            raise

    # -- one request ------------------------------------------------------------------------------------

    async def _serve(self, route: Route, request: web.Request) -> web.StreamResponse:
        id = f"req_{secrets.token_hex(12)}"
        exchange = Exchange(request, route, self.state, _EVERYONE, id)
        status = 499
        try:
            response = await self._answer(exchange)
            status = response.status
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.state.metrics.aborted()
            raise
        except Exception as error:
            told = fault(error)
            if isinstance(error, Overloaded):
                told = replace(told, retry_after=self.state.gate.patience())
            status = told.status
            return await self._refuse(exchange, told)
        finally:
            if exchange.started is not None:
                exchange.started.close()
            self.state.metrics.request(route.path, status)
            _log.debug("%s %s %s %s", id, route.method, route.path, status)

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        route, state = exchange.route, self.state
        if route.access != "open":
            exchange.caller = self._caller(exchange)
        if not route.early:
            state.serving()
        if route.body is not None:
            await exchange.read()
        with state.gate.enter(exchange.caller, route.weigh(exchange.body)) if route.gated else nullcontext():
            answer = await route.handler(exchange)
        if isinstance(answer, Answer):
            headers = exchange.headers() | answer.headers | {"Content-Type": answer.content_type}
            return web.Response(body=answer.encoded(), status=answer.status, headers=headers)
        return answer

    def _caller(self, exchange: Exchange) -> Caller:
        keys = self.state.config.keys
        if not keys:
            host = exchange.request.url.host or ""
            if not is_loopback(host):  # a page elsewhere whose name was made to mean this machine
                raise HttpError(403, f"host {host[:80]!r}: without keys only this machine is served", code="host")
            return _EVERYONE
        scheme, _, token = (exchange.header("authorization") or "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else exchange.header("x-api-key")
        caller = keys.find(key) if key else None
        if caller is None:
            reason = "this key is not known" if key else "send a key, as Authorization: Bearer or x-api-key"
            raise HttpError(401, reason, code="invalid_api_key")
        if exchange.route.access == "admin" and caller.role != "admin":
            raise HttpError(403, "this needs an admin's key", code="not_an_admin")
        return caller

    async def _refuse(self, exchange: Exchange, told: Fault) -> web.StreamResponse:
        stream = exchange.started
        shape = exchange.route.shape
        body = errors.body(shape, told, exchange.id)
        if stream is not None and stream.begun:
            # The status is out: the error is an event, and no end of a stream that went well follows it.
            await stream.send(body, event="error" if shape in ("anthropic", "weft") else None)
            stream.close()
            await stream.response.write_eof()
            return stream.response
        headers = exchange.headers() | told.headers
        answer = Answer(body)
        return web.Response(
            body=answer.encoded(), status=told.status, headers=headers, content_type=answer.content_type
        )

    @web.middleware
    async def _unrouted(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """What the router itself refuses, in the shape of the API it looks like."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            shape: errors.Shape = "openai" if request.path.startswith("/v1/") else "weft"
            if request.path.startswith("/v1/messages"):
                shape = "anthropic"
            reason = f"{request.method} {request.path}: {error.reason}"
            told = Fault(error.status, reason, (error.reason or "").lower().replace(" ", "_"))
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            body = Answer(errors.body(shape, told)).encoded()
            return web.Response(body=body, status=error.status, headers=allow, content_type="application/json")


def _close_late(making: asyncio.Future[Engine]) -> None:
    """An engine that came when nobody waited for it any more."""
    if not making.cancelled() and making.exception() is None:
        making.result().close()
