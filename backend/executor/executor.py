"""Runs `@sgl.function` programs on one event loop, thousands at a time.

A program's body is a greenlet; each of its states works off its own line of expressions. The body goes on while
generations run, and waits only where it reads what is not there yet.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from sglang.lang import ir

from weft.backend.executor.admission import Admission, Need, declared
from weft.backend.executor.base import (
    UNLIMITED,
    Cost,
    Ground,
    Limits,
    Piece,
    ProgramError,
    Scope,
    Tally,
    Took,
)
from weft.backend.executor.branches import run_body
from weft.backend.executor.greenlets import spawn
from weft.backend.executor.lane import Lane
from weft.backend.executor.outside import Outside
from weft.backend.executor.stalls import Stall, Watchman
from weft.backend.executor.state import State
from weft.backend.executor.transcript import Gates, Transcript
from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine.front import Engine
from weft.runtime.errors import DeadlineExceeded, RequestError, UnsupportedError

_SAMPLING = inspect.signature(ir.SglSamplingParams).parameters.keys()


@dataclass(frozen=True)
class Run:
    """A run that has ended. state: the program's own, with its text and variables. value: what it returned.
    cost: over all its states. most: the most it held at one time."""

    state: State
    value: Any
    cost: Cost
    most: Need

    def __getitem__(self, name: str) -> Any:
        return self.state[name]

    def text(self) -> str:
        return self.state.text()


class ProgramExecutor:
    """Over one engine, which is the caller's to close. Used from one event loop at a time. `close` it, or use it
    as a context manager, to end its threads."""

    def __init__(
        self,
        engine: Engine,
        *,
        thinking: bool = False,
        namespace: str = "",
        reserve: Literal["declared", "traced"] = "declared",
        patience: float | None = 0.0,
        stall: float = 0.1,
        on_stall: Callable[[Stall], None] | None = None,
    ) -> None:
        """thinking: assistant turns begin inside `<think>`. namespace: as for `Engine.open`.

        reserve: slots and KV for programs that declare what they need (`declare`), or also for those that were
        seen to. patience: seconds that such a run may wait for them before it is refused as `Overloaded`, None for
        as long as it takes. stall: seconds for which a program may hold the loop before it is reported, to
        `on_stall` too."""
        self.engine = engine
        self._template = DeepSeekV4Template(thinking)
        self._namespace = namespace
        self._reserve, self._patience = reserve, patience
        self._admission = Admission(engine)
        self._outside = Outside()
        self._watchman = Watchman(stall, on_stall)
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, Gates] = WeakKeyDictionary()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that tools and the watch over the loop run in. Safe to call twice."""
        self._outside.close()
        self._watchman.close()

    async def run(self, program: Any, *args: Any, within: Limits = UNLIMITED, **kwargs: Any) -> Run:
        """The program's arguments by place or name, and sglang's sampling defaults (`temperature`, `stop` ...) by
        name; an argument that the program has itself is the program's.

        Raises `ProgramError`; `DeadlineExceeded`; `Overloaded` before anything was done; what the program's own
        code raises. Cancelling the task ends all of its states."""
        return await self._run(program, args, kwargs, within, None)

    async def stream(
        self, program: Any, *args: Any, within: Limits = UNLIMITED, **kwargs: Any
    ) -> AsyncIterator[Piece | Run]:
        """Every piece of every variable of every state as it is made, then the run. Leaving early cancels it."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._run(program, args, kwargs, within, pieces.put_nowait))
        task.add_done_callback(lambda done: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await task
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # if it failed, whoever left early does not care

    async def follow(
        self,
        program: Any,
        arguments: Mapping[str, Any],
        *,
        within: Limits = UNLIMITED,
        emit: Callable[[Piece], None] | None = None,
        told: Callable[[Took], None] | None = None,
    ) -> Run:
        """`run`, with the pieces of its variables, and what each primitive took, told as they come."""
        return await self._run(program, (), dict(arguments), within, emit, told=told)

    def of(self, namespace: str) -> ProgramExecutor:
        """One that shares this one's room and threads, with KV of another namespace. Not to be closed."""
        other = copy.copy(self)
        other._namespace = namespace
        return other

    async def batch(
        self,
        program: Any,
        arguments: Iterable[Mapping[str, Any]],
        *,
        concurrency: int = 256,
        within: Limits = UNLIMITED,
        progress: Callable[[int], None] | None = None,
        **defaults: Any,
    ) -> list[Run | Exception]:
        """A run for each set of arguments, so many at a time; results in order, failures in the place of theirs.
        within: limits of each. progress: told how many have ended. defaults: of sampling."""
        if type(concurrency) is not int or concurrency < 1:
            raise RequestError("concurrency", concurrency, "must be an integer, at least 1")
        own = list(arguments)
        results: list[Run | Exception | None] = [None] * len(own)
        waiting, ended = iter(enumerate(own)), 0

        async def work() -> None:
            nonlocal ended
            for place, given in waiting:
                try:
                    results[place] = await self._run(
                        program, (), {**defaults, **given}, within, None, patient=True
                    )
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
        within: Limits,
        emit: Callable[[Piece], None] | None,
        patient: bool = False,
        told: Callable[[Took], None] | None = None,
    ) -> Run:
        own, defaults = _split(program, args, kwargs)
        async with AsyncExitStack() as stack:
            need = declared(program).need
            if need is None and self._reserve == "traced":
                need = self._admission.traced(program)
            if need is not None:
                await stack.enter_async_context(self._admission.enter(need, None if patient else self._patience))
            ground = self._ground(program, defaults, emit, told)
            scope = Scope(ground, within)
            state = State(Lane(scope, Transcript(self.engine, ground.gates, self._namespace)))
            try:
                value = await self._body(program, state, args, own)
            finally:
                scope.close()
                self._admission.saw(program, ground.tally)
        return Run(state, value, scope.cost, Need(ground.tally.most_states, ground.tally.most_tokens))

    async def _body(self, program: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it to the end of all its states, or to its deadline."""
        scope = state.lane.scope
        ground, body = scope.ground, partial(run_body, program, state, args, kwargs)
        try:
            async with asyncio.timeout_at(scope.ends_on_loop()):
                if declared(program).thread:
                    return await self._outside.call("program", body, contextvars.copy_context())
                return await spawn(body, watch=ground.watch)
        except (TimeoutError, ProgramError) as error:
            cause = error.__cause__ if isinstance(error, ProgramError) else error
            late = scope.ends is not None and time.monotonic() >= scope.ends
            if late and isinstance(cause, TimeoutError | DeadlineExceeded):
                raise DeadlineExceeded(f"{ground.program}: the run's deadline has passed") from error
            raise  # the program's own

    def _ground(
        self,
        program: Any,
        defaults: Any,
        emit: Callable[[Piece], None] | None,
        told: Callable[[Took], None] | None,
    ) -> Ground:
        name, loop = program.func.__name__, asyncio.get_running_loop()
        gates = self._gates.get(loop) or self._gates.setdefault(loop, Gates(self.engine))
        return Ground(
            program=name,
            engine=self.engine,
            template=self._template,
            defaults=defaults,
            loop=loop,
            thread=threading.get_ident(),
            watch=self._watchman.watch(name, program.func.__code__),
            outside=self._outside,
            gates=gates,
            tally=Tally(),
            emit=emit,
            told=told,
            namespace=self._namespace,
        )


def _split(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments of the program, and sampling defaults."""
    if program.num_api_spec_tokens is not None:
        raise UnsupportedError("num_api_spec_tokens", program.num_api_spec_tokens, "for remote chat APIs only")
    signature = _signature(program.func)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    defaults = ir.SglSamplingParams()
    own: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _SAMPLING and name not in signature.parameters:
            setattr(defaults, name, value)
        elif name in signature.parameters or takes_any:
            own[name] = value
        else:
            raise RequestError(name, value, f"{program.func.__name__} has no such argument")
    try:
        signature.bind(None, *args, **(own | program.bind_arguments))
    except TypeError as error:
        given = [*map(repr, args), *own]
        raise RequestError("arguments", ", ".join(given), f"{program.func.__name__}: {error}") from None
    return own, defaults


@lru_cache(1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
