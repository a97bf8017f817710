"""Functions that wait without blocking: each runs in a greenlet of its own, on an event loop.

`spawn(function)` is awaited; whatever the function calls may `wait` for an awaitable, which gives the loop to
others until it is done. A cancelled `spawn` raises `CancelledError` where the function waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from weft.backend.executor.base import Ground, Scope
    from weft.backend.executor.stalls import Watch

T = TypeVar("T")


class _Body(greenlet):
    """What `spawn` runs: its parent is the loop's greenlet, which awaits for it."""


def may_wait() -> bool:
    return isinstance(getcurrent(), _Body)


def wait(awaitable: Awaitable[T]) -> T:
    """Its result. Only within `spawn`."""
    body = getcurrent()
    assert isinstance(body, _Body) and body.parent is not None, "nobody here awaits"
    result: T = body.parent.switch(awaitable)
    return result


async def spawn(function: Callable[..., Any], *args: Any, watch: Watch | None = None) -> Any:
    """The function's result. watch: told when the function holds the loop, and when it does not."""
    body = _Body(function)
    body.gr_context = contextvars.copy_context()
    switch, argument = body.switch, args
    while True:
        if watch is not None:
            watch.begins()
        try:
            result = switch(*argument)
        finally:
            if watch is not None:
                watch.ends()
        if body.dead:
            return result
        try:
            argument, switch = (await result,), body.switch
        except BaseException as error:
            argument, switch = (error,), body.throw


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine inside `spawn`, so that what it calls may `wait` as well as await."""
    error: BaseException | None = None
    while True:
        try:
            future = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        error = None
        try:
            wait(_Passed(future))
        except BaseException as raised:
            error = raised


class _Passed:
    """Hands a future that a coroutine has yielded on to the loop."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, None]:
        yield self._future


class OfLoop(Protocol):
    """What belongs to a loop, as long as its scope is open."""

    @property
    def ground(self) -> Ground: ...

    scope: Scope


S = TypeVar("S", bound=OfLoop)
P = ParamSpec("P")


def on_loop(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Called from a thread, as by programs that run in one, the method runs on the loop, and may wait."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_ident() == self.ground.thread or self.scope.closed:
            return method(self, *args, **kwargs)
        work = spawn(partial(method, self, *args, **kwargs))
        result: T = asyncio.run_coroutine_threadsafe(work, self.ground.loop).result()
        return result

    return call
