"""Runs `@sgl.function` programs on one event loop, thousands at a time.

A program's body is a greenlet; each of its states works off its own line of expressions. The body goes on while
generations run, and waits only where it reads what is not there yet.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.lang import ir

from weft.backend.executor.base import Cost, Piece, ProgramError, Scope
from weft.backend.executor.greenlets import drive, spawn
from weft.backend.executor.lane import Lane
from weft.backend.executor.state import State
from weft.backend.executor.transcript import Transcript
from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import absolute
from weft.runtime.errors import DeadlineExceeded, RequestError

_SAMPLING = inspect.signature(ir.SglSamplingParams).parameters.keys()


@dataclass(frozen=True)
class Run:
    """A run that has ended. state: the program's own, with its text and variables. value: what it returned."""

    state: State
    value: Any
    cost: Cost

    def __getitem__(self, name: str) -> Any:
        return self.state[name]

    def text(self) -> str:
        return self.state.text()


class ProgramExecutor:
    """Over one engine, which is the caller's to close. Used from one event loop."""

    def __init__(self, engine: Engine, *, thinking: bool = False, namespace: str = "") -> None:
        """thinking: assistant turns begin inside `<think>`. namespace: as for `Engine.open`."""
        self.engine = engine
        self._template = DeepSeekV4Template(thinking)
        self._namespace = namespace

    async def run(self, program: Any, *args: Any, deadline: float | None = None, **kwargs: Any) -> Run:
        """The program's arguments by place or name, and sglang's sampling defaults (`temperature`, `stop` ...) by
        name; an argument that the program has itself is the program's. deadline: in seconds.

        Raises `ProgramError`; `DeadlineExceeded`; what the program's own code raises. Cancelling the task ends all
        of its states."""
        return await self._run(program, args, kwargs, deadline, lambda piece: None)

    async def stream(
        self, program: Any, *args: Any, deadline: float | None = None, **kwargs: Any
    ) -> AsyncIterator[Piece | Run]:
        """Every piece of every variable of every state as it is made, then the run. Leaving early cancels it."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._run(program, args, kwargs, deadline, pieces.put_nowait))
        task.add_done_callback(lambda done: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await task
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def batch(
        self,
        program: Any,
        arguments: Iterable[Mapping[str, Any]],
        *,
        concurrency: int = 256,
        deadline: float | None = None,
        progress: Callable[[int], None] | None = None,
        **defaults: Any,
    ) -> list[Run | Exception]:
        """A run for each set of arguments, so many at a time; results in order, failures in the place of theirs.
        deadline: of each. progress: told how many have ended. defaults: of sampling."""
        if type(concurrency) is not int or concurrency < 1:
            raise RequestError("concurrency", concurrency, "must be an integer, at least 1")
        own = list(arguments)
        results: list[Run | Exception | None] = [None] * len(own)
        waiting, ended = iter(enumerate(own)), 0

        async def work() -> None:
            nonlocal ended
            for place, given in waiting:
                try:
                    results[place] = await self.run(program, deadline=deadline, **{**defaults, **given})
                except Exception as error:
                    results[place] = error
                ended += 1
                if progress is not None:
                    progress(ended)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(own))):
                group.create_task(work())
        return [result for result in results if result is not None]

    async def _run(
        self,
        program: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None,
        emit: Callable[[Piece], None],
    ) -> Run:
        own, defaults = self._split(program, kwargs)
        scope = Scope(
            program.func.__name__,
            self.engine,
            self._template,
            defaults,
            asyncio.get_running_loop(),
            emit,
            self._namespace,
            absolute(deadline),
        )
        state = State(Lane(scope, Transcript(self.engine, self._namespace)))
        try:
            async with asyncio.timeout_at(_on_loop(scope)):
                value = await spawn(_body, program.func, state, args, own | program.bind_arguments)
            return Run(state, value, scope.cost)
        except TimeoutError:
            if scope.ends is None or time.monotonic() < scope.ends:
                raise  # the program's own
            raise DeadlineExceeded(f"{scope.program}: the run's deadline has passed") from None
        finally:
            scope.close()

    @staticmethod
    def _split(program: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Arguments of the program, and sampling defaults."""
        defaults = ir.SglSamplingParams()
        own: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in program.arg_names:
                own[name] = value
            elif name in _SAMPLING:
                setattr(defaults, name, value)
            else:
                raise RequestError(name, value, f"{program.func.__name__} has no such argument")
        return own, defaults


def _on_loop(scope: Scope) -> float | None:
    """Its deadline by the loop's clock."""
    return None if scope.ends is None else scope.loop.time() + scope.ends - time.monotonic()


def _body(function: Callable[..., Any], state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs in the greenlet; the run ends with the last of its states that were not joined, or fails with one."""
    value = function(state, *args, **kwargs)
    if inspect.iscoroutine(value):
        value = drive(value)
    scope = state.lane.scope
    for lane in list(scope.lanes):
        if not lane.closed:
            lane.sync()
    return value


__all__ = ["Cost", "Piece", "ProgramError", "ProgramExecutor", "Run"]
