"""Server-sent events to one client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies that would gather events
}
_ROOM = 1 << 14  # bytes; a transport asks its writers to wait from four times as many on
_encoder = msgspec.json.Encoder()


class EventStream:
    """Owned by its handler, which closes it. The head is sent with the first event, or with the first sign of
    life: when nothing was sent for `keepalive` seconds, `beat` is. A client that takes nothing for `slow` seconds
    is gone (`ConnectionResetError`), so that what it asked for ends."""

    def __init__(
        self, request: web.Request, keepalive: float, slow: float, beat: bytes, headers: Mapping[str, str]
    ) -> None:
        self.response = web.StreamResponse(headers={**_HEADERS, **headers})
        self._request, self._keepalive, self._slow, self._beat = request, keepalive, slow, beat
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._last = self._loop.time()
        self._timer = self._loop.call_later(keepalive, self._look)
        self._beating: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        return self.response.prepared

    async def send(self, data: Any, event: str | None = None, id: str | None = None) -> None:
        """data: a struct, or bytes that are JSON."""
        raw = data if isinstance(data, bytes) else _encoder.encode(data)
        head = (f"id: {id}\n" if id is not None else "") + (f"event: {event}\n" if event is not None else "")
        await self.write(head.encode() + b"data: " + raw + b"\n\n")

    async def write(self, raw: bytes) -> None:
        transport = self._request.transport
        if (
            self.response.prepared
            and len(raw) < _ROOM
            and not self._lock.locked()
            and transport is not None
            and transport.get_write_buffer_size() < _ROOM
        ):
            # The transport takes it without a wait, so there is nothing to time, nor to keep others from.
            await self.response.write(raw)
            self._last = self._loop.time()
            return
        try:
            async with asyncio.timeout(self._slow):
                async with self._lock:
                    if not self.response.prepared:
                        await self.response.prepare(self._request)
                    await self.response.write(raw)
        except TimeoutError:
            if transport is not None:
                transport.abort()
            raise ConnectionResetError(f"the client took nothing for {self._slow:g} s") from None
        self._last = self._loop.time()

    async def done(self, last: bytes = b"") -> web.StreamResponse:
        """The stream's end. last: `data: [DONE]`, where an API has it."""
        if last or not self.response.prepared:
            await self.write(last)
        self.close()
        await self.response.write_eof()
        return self.response

    def close(self) -> None:
        """No more signs of life. Safe to call twice."""
        self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()

    def _look(self) -> None:
        silent = self._loop.time() - self._last
        if silent >= self._keepalive and (self._beating is None or self._beating.done()):
            self._beating = self._loop.create_task(self._show_life())
            silent = 0.0
        self._timer = self._loop.call_later(max(self._keepalive - silent, 0.01), self._look)

    async def _show_life(self) -> None:
        try:
            await self.write(self._beat)
        except (ConnectionError, RuntimeError):  # the client has left: its handler is told
            self._timer.cancel()


DONE = b"data: [DONE]\n\n"
