"""From the many threads that sglang calls in, to the one event loop that does the work."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from weft.runtime.errors import Cancelled, EngineDead

T = TypeVar("T")


class Bridge:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._submitting = threading.Lock()
        self._down = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weft-backend", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine; `EngineDead` once the bridge is closed."""
        with self._submitting:
            if self._down:
                work.close()
                raise EngineDead("the backend was shut down")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; `Cancelled` if the bridge is closed meanwhile."""
        try:
            return self.submit(work).result()
        except concurrent.futures.CancelledError:
            raise shut_down() from None

    def close(self) -> None:
        """Cancel what runs, and stop the loop. Safe to call twice."""
        with self._submitting:
            if self._down:
                return
            self._down = True
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def shut_down() -> Cancelled:
    return Cancelled("the backend was shut down")


async def _cancel_all() -> None:
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
