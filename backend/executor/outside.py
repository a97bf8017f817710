"""Where code runs that must not hold the loop: threads, and an event loop of its own for coroutines."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Outside:
    """Its threads are daemons: a function that never ends does not keep Python from exiting. Owned by an
    executor."""

    def __init__(self, threads: int = 64) -> None:
        """threads: calls of one kind, tools or programs, that run at a time; others wait."""
        self._threads = threads
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]]
        self._gates = WeakKeyDictionary()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def call(self, kind: str, function: Callable[[], T], context: contextvars.Context) -> T:
        """A function's result, from a thread. It cannot be stopped: when the caller is cancelled it goes on, and
        its result is dropped."""
        loop = asyncio.get_running_loop()
        gate = self._gates.setdefault(loop, {}).setdefault(kind, asyncio.Semaphore(self._threads))
        await gate.acquire()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            gate.release()
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            result, failure = None, None
            try:
                result = context.run(function)
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(finish, result, failure)

        threading.Thread(target=work, name=f"weft-{kind}", daemon=True).start()
        return await future

    async def coroutine(self, function: Callable[[], Awaitable[T]], context: contextvars.Context) -> T:
        """A coroutine function's result, from the other loop; it is cancelled with the caller."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="weft-tools", daemon=True)
            self._thread.start()

        async def run() -> T:
            return await function()

        return await asyncio.wrap_future(context.run(asyncio.run_coroutine_threadsafe, run(), self._loop))

    def close(self) -> None:
        """Ends the other loop, with what runs on it. Safe to call twice."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
