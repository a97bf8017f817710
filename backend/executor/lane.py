"""One state of a program: its expressions, one after another, on one transcript.

What takes no time (text, roles, scopes) is done at once; generations and selections wait in line, worked off by a
task of the loop. The first error ends the lane: what waits for it, or asks it for more, gets that error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

from sglang.lang import ir

from weft.backend.executor.base import Piece, ProgramError, Scope
from weft.backend.executor.generation import generate, select
from weft.backend.executor.greenlets import may_wait, wait
from weft.backend.executor.transcript import Transcript
from weft.runtime.errors import RequestError, UnsupportedError

_AT_ONCE = (ir.SglConstantText, ir.SglRoleBegin, ir.SglRoleEnd, ir.SglVarScopeBegin, ir.SglVarScopeEnd)


class Lane:
    """Owned by its run (`Scope`), which ends it. path: "" for the program's own, "/0/1" for forks of forks."""

    def __init__(self, scope: Scope, transcript: Transcript, path: str = "") -> None:
        self.scope, self.transcript, self.path = scope, transcript, path
        self.variables: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.error: ProgramError | None = None
        self.closed = False
        self.forked_at = 0  # characters
        self._role: str | None = None
        self._role_start = 0
        self._forks = 0
        self._awaited: dict[str, asyncio.Future[None]] = {}
        self._starts: dict[str, int] = {}  # characters before a variable's text
        self._unseparated: set[str] = set()  # variables with reasoning that will be split off
        self._queue: deque[ir.SglExpr] = deque()
        self._task: asyncio.Task[None] | None = None
        scope.lanes.append(self)

    # -- what a program's body does ---------------------------------------------------------------------

    def submit(self, expression: Any) -> None:
        self._check()
        leaves = list(_leaves(expression))
        for leaf in leaves:
            for name in _names(leaf):
                self._awaited[name] = self.scope.loop.create_future()
            if isinstance(leaf, ir.SglSeparateReasoning):
                self._unseparated.update(own.name for own in _generated(leaf.expr))
        self._queue.extend(leaves)
        if self._task is None:
            self._work_at_once()
        if self._task is None and self._queue:
            self._task = self.scope.loop.create_task(self._work())

    def get(self, name: str) -> Any:
        """A variable, once it is there."""
        self.settle(name)
        return self.variables[name]

    def settle(self, name: str) -> None:
        """Until the variable is there, or never will be."""
        future = self._awaited.get(name)
        if future is not None and not future.done():
            self._wait(asyncio.wait({future}))
        if self.error is not None and name not in self.variables:
            raise self.error

    def sync(self) -> None:
        """Until all that was submitted is done."""
        if self._task is not None:
            self._wait(asyncio.wait({self._task}))
        if self.error is not None:
            raise self.error

    def fork(self, count: int) -> list[Lane]:
        """Lanes that go on from here, each its own way."""
        if type(count) is not int or count < 1:
            raise RequestError("size", count, "must be an integer, at least 1")
        self.sync()
        lanes = []
        for number, transcript in enumerate(self.transcript.fork(count), self._forks):
            lane = Lane(self.scope, transcript, f"{self.path}/{number}")
            lane.variables, lane.messages = dict(self.variables), list(self.messages)
            lane._role, lane._role_start = self._role, self._role_start
            lane.forked_at = len(transcript.text)
            lanes.append(lane)
        self._forks += count
        return lanes

    def close(self) -> None:
        """End it: what is under way is cancelled, its KV given back. Safe to call twice."""
        self.closed = True
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        self.transcript.close()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        self.scope.check()

    def _wait(self, awaitable: Coroutine[Any, Any, Any]) -> None:
        if not may_wait():
            awaitable.close()
            raise RuntimeError("the run has not ended, and only its program may wait for it")
        wait(awaitable)

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
                    await self._execute(leaf)
        except asyncio.CancelledError as error:
            self._fail(error)
            raise
        except Exception as error:
            self._fail(error)
        finally:
            self._task = None

    def _fail(self, error: BaseException) -> None:
        name = next((name for name, future in self._awaited.items() if not future.done()), None)
        if isinstance(error, ProgramError):
            self.error = error
        else:
            self.error = ProgramError(self.scope.program, self.path, name, error)
            self.error.__cause__ = error
        self._queue.clear()
        for future in self._awaited.values():
            if not future.done():
                future.set_result(None)

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
                    self.add(other.transcript.text[other.forked_at :])
            case ir.SglSeparateReasoning():
                self._separate(leaf.model_type, leaf.expr)
            case ir.SglImage() | ir.SglVideo():
                raise UnsupportedError("image", leaf.path, "DeepSeek-V4 reads text only")
            case _:
                raise UnsupportedError("expression", type(leaf).__name__, "not an expression of a program")

    async def ended(self) -> None:
        """For other lanes: until this one's line is empty; raises its error."""
        if self._task is not None:
            await asyncio.wait({self._task})
        if self.error is not None:
            raise self.error

    async def _append_variable(self, leaf: Any) -> None:
        other: Lane = leaf.source_stream_executor
        future = other._awaited.get(leaf.name)
        if future is not None and not future.done():
            await asyncio.wait({future})
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
        future = self._awaited.get(name)
        if future is not None and not future.done():
            future.set_result(None)

    def piece(self, name: str | None, text: str, meta: dict[str, Any] | None) -> None:
        """More of a variable."""
        self.scope.emit(Piece(self.path, name, text, meta))

    def _begin_role(self, role: str) -> None:
        if self._role is not None:
            raise RequestError("role", role, f"{self._role} has not ended; roles cannot be nested")
        prefix, _ = self.scope.template.get_prefix_and_suffix(role, self.messages)
        self._role = role
        self.add(prefix)
        self._role_start = len(self.transcript.text)

    def _end_role(self, role: str) -> None:
        said = self.transcript.text[self._role_start :].lstrip()
        self._role = None
        _, suffix = self.scope.template.get_prefix_and_suffix(role, self.messages)
        self.add(suffix)
        self.messages.append({"role": role, "content": said})

    def _separate(self, model_type: str, expression: Any) -> None:
        """Split the reasoning off variables, with sglang's own parser; the text keeps the answers only."""
        for own in reversed(_generated(expression)):
            whole, start = self.variables[own.name], self._starts[own.name]
            reasoning, answer = reasoning_parser(model_type).parse_non_stream(whole)
            behind = answer + self.transcript.text[start + len(whole) :]
            self.transcript.replace_end(start, behind)
            self._unseparated.discard(own.name)
            self.set(f"{own.name}_reasoning_content", reasoning, {})
            self.set(own.name, answer, self.meta[own.name])


def _leaves(expression: Any) -> Any:
    """The expressions of a list of lists of expressions, in order."""
    if isinstance(expression, str):
        expression = ir.SglConstantText(expression)
    if isinstance(expression, ir.SglExprList):
        for own in expression.expr_list:
            yield from _leaves(own)
    elif isinstance(expression, ir.SglExpr):
        if not isinstance(expression, ir.SglCommitLazy):
            yield expression
    else:
        raise RequestError("expression", expression, "must be text or an expression of sglang")


def _generated(expression: Any) -> list[Any]:
    return [own for own in _leaves(expression) if isinstance(own, ir.SglGen | ir.SglSelect)]


def reasoning_parser(model_type: str) -> Any:
    from sglang.srt.parser.reasoning_parser import ReasoningParser  # heavy, and seldom asked for

    return ReasoningParser(model_type)


def _names(leaf: ir.SglExpr) -> list[str]:
    """Variables that an expression will set."""
    if isinstance(leaf, ir.SglSeparateReasoning):
        return [f"{own.name}_reasoning_content" for own in _generated(leaf.expr)]
    if isinstance(leaf, ir.SglGen | ir.SglSelect | ir.SglVarScopeBegin):
        return [leaf.name] if leaf.name is not None else []
    return []
