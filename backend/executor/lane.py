"""One state of a program: its expressions, one after another, on one transcript.

What takes no time (text, roles, scopes) is done at once; generations and selections wait in line, worked off by a
task of the loop. The first error ends the lane: what waits for it, or asks it for more, gets that error.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sglang.lang import ir

from weft.backend.executor.base import Ground, Piece, ProgramError, Scope
from weft.backend.executor.generation import generate, select
from weft.backend.executor.greenlets import may_wait, on_loop, wait
from weft.backend.executor.leaves import Compute, Plain, generated, leaves, names, separated
from weft.backend.executor.transcript import Transcript
from weft.runtime.errors import RequestError, UnsupportedError

_AT_ONCE = (ir.SglConstantText, ir.SglRoleBegin, ir.SglRoleEnd, ir.SglVarScopeBegin, ir.SglVarScopeEnd)
_WORTH = 256  # characters of text that are worth a call of their own, to be computed while the program waits

T = TypeVar("T")


class Lane:
    """Owned by its scope, which ends it. path: "" for the program's own, "/0/1" for forks of forks."""

    def __init__(self, scope: Scope, transcript: Transcript, path: str = "") -> None:
        self.scope, self.transcript, self.path = scope, transcript, path
        self.variables: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.error: ProgramError | None = None
        self.closed = False
        self.tokens = 0  # of its own, behind those of the fork it began with
        transcript.owner = self
        self._role: str | None = None
        self._role_start = 0
        self._forks = 0
        self._making: Counter[str] = Counter()  # variables that will be set, and how often
        self._waiting: dict[str | None, list[asyncio.Future[None]]] = {}  # for them; None: for the end of the line
        self._starts: dict[str, int] = {}  # characters before a variable's text
        self._unseparated: set[str] = set()  # variables with reasoning that will be split off
        self._queue: deque[ir.SglExpr] = deque()
        self._task: asyncio.Task[None] | None = None
        scope.adopt(self)

    @property
    def ground(self) -> Ground:
        return self.scope.ground

    # -- what a program's body does ---------------------------------------------------------------------

    @on_loop
    def submit(self, expression: Any) -> None:
        self._check()
        more = list(leaves(expression))
        for leaf in more:
            for name in names(leaf):
                self._making[name] += 1
            if isinstance(leaf, ir.SglSeparateReasoning):
                self._unseparated.update(own.name for own in generated(leaf.expr))
        self._queue.extend(more)
        if self._task is None:
            self._work_at_once()
        self._start()

    def _start(self) -> None:
        if self._task is None and self._queue:
            self._task = self.ground.loop.create_task(self._work())

    @on_loop
    def get(self, name: str) -> Any:
        """A variable, once it is there."""
        self.settle(name)
        return self.variables[name]

    @on_loop
    def settle(self, name: str) -> None:
        """Until the variable is there, or never will be."""
        if self._making[name]:
            self.wait(self._waiter(name))
        if self.error is not None and name not in self.variables:
            raise self.error

    @on_loop
    def sync(self) -> None:
        """Until all that was submitted is done."""
        self.rest()
        if self.error is not None:
            raise self.error

    @on_loop
    def rest(self) -> None:
        """Until all that was submitted is done, or has failed."""
        if self._task is not None:
            self.wait(self._waiter(None))

    @on_loop
    def fork(self, count: int, scopes: list[Scope] | None = None) -> list[Lane]:
        """Lanes that go on from here, each its own way. scopes: whose they are, if not this one's."""
        if type(count) is not int or count < 1:
            raise RequestError("size", count, "must be an integer, at least 1")
        self._check()
        self.sync()
        lanes = []
        for number, transcript in enumerate(self.transcript.fork(count)):
            scope = self.scope if scopes is None else scopes[number]
            lane = Lane(scope, transcript, f"{self.path}/{self._forks + number}")
            lane.variables, lane.messages = dict(self.variables), list(self.messages)
            lane.meta = dict(self.meta)
            lane._role, lane._role_start = self._role, self._role_start
            lanes.append(lane)
        self._forks += count
        return lanes

    def fresh(self, scope: Scope) -> Lane:
        """A lane without a history, counted among this one's forks."""
        self._check()
        ground = self.ground
        transcript = Transcript(ground.engine, ground.gates, ground.namespace)
        lane = Lane(scope, transcript, f"{self.path}/{self._forks}")
        self._forks += 1
        return lane

    @on_loop
    def become(self, other: Lane) -> None:
        """Go on from where one of its forks has come to, which ends."""
        other.sync()
        self.sync()
        self.wait(other.transcript.succeed(self.transcript))
        self.transcript, other.transcript = other.transcript, self.transcript
        self.transcript.owner = self
        self.grew(other.tokens)
        self.variables, self.meta, self.messages = other.variables, other.meta, other.messages
        self._role, self._role_start = other._role, other._role_start
        self._starts.update(other._starts)
        other.close()

    @on_loop
    def close(self) -> None:
        """End it: what is under way is cancelled, its KV given back. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        self.transcript.close()
        self.scope.gave_up(self)

    def compute_ahead(self) -> None:
        """The program is about to wait: what it has said so far can be computed."""
        if self._task is None and not self.closed and self.transcript.unsent > _WORTH:
            self._queue.append(Compute())
            self._start()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        self.scope.check()

    @on_loop
    def wait(self, awaitable: Awaitable[T]) -> T:
        """Until it is done; others go on."""
        if not may_wait():
            if isinstance(awaitable, Coroutine):
                awaitable.close()
            raise RuntimeError("the run has not ended, and only its program may wait for it")
        for lane in self.scope.lanes:
            lane.compute_ahead()
        return wait(awaitable)

    @on_loop
    def leased(self, seconds: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`wait` for what `work` begins, something that takes so long at most; KV of others is let
        go of first."""
        self._check()
        self.sync()
        self.transcript.lease(seconds)
        try:
            return self.wait(work())
        finally:
            self.transcript.lease(0)

    # -- the line ---------------------------------------------------------------------------------------

    def _work_at_once(self) -> None:
        try:
            while self._queue and isinstance(self._queue[0], _AT_ONCE):
                self._at_once(self._queue.popleft())
        except Exception as error:
            self._fail(error)
            assert self.error is not None
            raise self.error from error

    async def _work(self) -> None:
        try:
            while self._queue:
                leaf = self._queue.popleft()
                if isinstance(leaf, _AT_ONCE):
                    self._at_once(leaf)
                else:
                    self.scope.check()
                    await self._execute(leaf)
        except asyncio.CancelledError as error:
            self._fail(error)
            raise
        except Exception as error:
            self._fail(error)
        finally:
            self._task = None
            self._notify(None)

    def _waiter(self, what: str | None) -> asyncio.Future[None]:
        """Of one who waits: its own, so that cancelling it is nobody else's affair."""
        waiter: asyncio.Future[None] = self.ground.loop.create_future()
        self._waiting.setdefault(what, []).append(waiter)
        return waiter

    def _notify(self, what: str | None) -> None:
        for waiter in self._waiting.pop(what, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        name = next(iter(self._making), None)
        self.error = (
            error if isinstance(error, ProgramError) else ProgramError(self.ground.program, self.path, name, error)
        )
        self._queue.clear()
        self._making.clear()
        for what in list(self._waiting):
            self._notify(what)

    def _at_once(self, leaf: ir.SglExpr) -> None:
        match leaf:
            case ir.SglConstantText():
                self.add(leaf.value)
            case ir.SglRoleBegin():
                self._begin_role(leaf.role)
            case ir.SglRoleEnd():
                self._end_role(leaf.role)
            case ir.SglVarScopeBegin():
                self.variables[leaf.name] = len(self.transcript.text)
            case ir.SglVarScopeEnd():
                start = self.variables[leaf.name]
                self.set(leaf.name, self.transcript.text[start:], {})

    async def _execute(self, leaf: ir.SglExpr) -> None:
        match leaf:
            case ir.SglGen():
                await generate(self, leaf)
            case ir.SglSelect():
                await select(self, leaf)
            case ir.SglVariable():
                await self._append_variable(leaf)
            case ir.SglConcateAndAppend():
                for state in leaf.states:
                    other = state.lane
                    await other.ended()
                    await self.transcript.add_own(other.transcript)
            case ir.SglSeparateReasoning():
                self._separate(leaf.model_type, leaf.expr)
            case Plain():
                await self.transcript.add_plain(leaf.value)
            case Compute():
                await self.transcript.compute(self.scope.left())
            case ir.SglImage() | ir.SglVideo():
                raise UnsupportedError("image", leaf.path, "DeepSeek-V4 reads text only")
            case _:
                raise UnsupportedError("expression", type(leaf).__name__, "not an expression of a program")

    async def ended(self) -> None:
        """For other lanes: until this one's line is empty; raises its error."""
        if self._task is not None:
            await self._waiter(None)
        if self.error is not None:
            raise self.error

    async def _append_variable(self, leaf: Any) -> None:
        other: Lane = leaf.source_stream_executor
        if other._making[leaf.name]:
            await other._waiter(leaf.name)
        if other.error is not None and leaf.name not in other.variables:
            raise other.error
        self.add(str(other.variables[leaf.name]))

    # -- text and variables -----------------------------------------------------------------------------

    def add(self, text: Any) -> None:
        self.transcript.add(str(text))

    def begins(self, name: str | None) -> None:
        """The text of a variable begins here."""
        if name is not None:
            self._starts[name] = len(self.transcript.text)

    def set(self, name: str | None, value: Any, meta: Any) -> None:
        """A variable is there. Text that has no name is in the transcript only."""
        if name is None:
            return
        self.variables[name], self.meta[name] = value, meta
        if name in self._unseparated:
            return
        self._making[name] -= 1
        if self._making[name] <= 0:
            del self._making[name]
            self._notify(name)

    def grew(self, tokens: int) -> None:
        """Its history has so many tokens more."""
        self.tokens += tokens
        self.ground.tally.grow(0, tokens)

    def piece(self, name: str | None, text: str, meta: dict[str, Any] | None, index: int = 0) -> None:
        """More of a variable."""
        if self.ground.emit is not None:
            self.ground.emit(Piece(self.path, name, text, meta, index))

    def _begin_role(self, role: str) -> None:
        if self._role is not None:
            raise RequestError("role", role, f"{self._role} has not ended. Nested roles are not allowed")
        prefix, _ = self.ground.template.get_prefix_and_suffix(role, self.messages)
        self._role = role
        self.add(prefix)
        self._role_start = len(self.transcript.text)

    def _end_role(self, role: str) -> None:
        said = self.transcript.text[self._role_start :].lstrip()
        self._role = None
        _, suffix = self.ground.template.get_prefix_and_suffix(role, self.messages)
        self.add(suffix)
        self.messages.append({"role": role, "content": said})

    def _separate(self, model_type: str, expression: Any) -> None:
        """Split the reasoning off variables, with sglang's own parser; the text keeps the answers only."""
        for own in reversed(generated(expression)):
            whole, start = self.variables[own.name], self._starts[own.name]
            reasoning, answer = separated(model_type, whole)
            behind = answer + self.transcript.text[start + len(whole) :]
            self.transcript.replace_end(start, behind)
            self._unseparated.discard(own.name)
            self.set(f"{own.name}_reasoning_content", reasoning, {})
            self.set(own.name, answer, self.meta[own.name])
