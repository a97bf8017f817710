"""What a program sees as `s`: sglang's ProgramState, over a lane in place of a thread, and more."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sglang.lang import ir

from weft.backend.executor.attempts import THREE, Attempts, attempt
from weft.backend.executor.base import UNLIMITED, Limits
from weft.backend.executor.branches import Body, Branch, run_branches
from weft.backend.executor.group import Group
from weft.backend.executor.tools import Tool
from weft.backend.executor.tools import tool as make_tool
from weft.backend.executor.turns import Toolbox, Turn, take_turn
from weft.runtime.engine import messages as m
from weft.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from weft.backend.executor.lane import Lane


class State:
    """Reading a variable that is still being made gives the loop to others until it is there; a failure of what
    makes it is raised there, as `ProgramError`."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    @property
    def stream_executor(self) -> Lane:
        """sglang's name for it; expressions that quote a variable of another state go by it."""
        return self.lane

    def __iadd__(self, other: Any) -> State:
        if other is None:
            raise ValueError("Tried to append None to state.")
        self.lane.submit(other)
        return self

    def __getitem__(self, name: str) -> Any:
        return self.lane.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.lane.variables[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.lane.variables

    def get_var(self, name: str) -> Any:
        return self.lane.get(name)

    def set_var(self, name: str, value: Any) -> None:
        self[name] = value

    def get_meta_info(self, name: str) -> Any:
        self.lane.settle(name)
        return self.lane.meta.get(name)

    def text(self) -> str:
        self.lane.sync()
        return self.lane.transcript.text

    def messages(self) -> list[dict[str, Any]]:
        self.lane.sync()
        return self.lane.messages

    def sync(self) -> None:
        self.lane.sync()

    def error(self) -> Exception | None:
        """Once all that was submitted is done, or has failed. Whatever else is asked of the state raises it."""
        self.lane.rest()
        return self.lane.error

    def __repr__(self) -> str:
        return f"State({self.lane.transcript.text!r})"

    # -- roles and scopes -------------------------------------------------------------------------------

    def system(self, expr: Any = None) -> Any:
        return self._role("system", expr)

    def user(self, expr: Any = None) -> Any:
        return self._role("user", expr)

    def assistant(self, expr: Any = None) -> Any:
        return self._role("assistant", expr)

    def _role(self, name: str, expr: Any) -> Any:
        if expr is None:
            return self._between(ir.SglRoleBegin(name), ir.SglRoleEnd(name))
        text = ir.SglConstantText(expr) if isinstance(expr, str) else expr
        whole = ir.SglExprList([ir.SglRoleBegin(name), text, ir.SglRoleEnd(name)])
        self.lane.submit(whole)
        return whole

    def var_scope(self, name: str) -> Any:
        return self._between(ir.SglVarScopeBegin(name), ir.SglVarScopeEnd(name))

    @contextmanager
    def _between(self, begin: ir.SglExpr, end: ir.SglExpr) -> Iterator[None]:
        self.lane.submit(begin)
        yield
        self.lane.submit(end)

    # -- forks ------------------------------------------------------------------------------------------

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> Group:
        """States that go on from here; what stands here is computed once."""
        if position_ids_offset is not None:
            raise UnsupportedError(
                "position_ids_offset", position_ids_offset, "KV is exact at its own positions only"
            )
        return Group([State(lane) for lane in self.lane.fork(size)], self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator[State]:
        group = self.fork(1, position_ids_offset)
        try:
            yield group[0]
        finally:
            group.join()

    def become(self, other: State) -> None:
        """Go on from where a fork of this state, or a branch that was kept, has come to; it ends."""
        self.lane.become(other.lane)

    # -- parts that run side by side --------------------------------------------------------------------

    def race(self, *bodies: Body, fresh: bool = False, keep: bool = False, within: Limits = UNLIMITED) -> Branch:
        """The first of them to succeed; the others are cancelled. See `gather`."""
        return run_branches(self, bodies, 1, fresh=fresh, keep=keep, within=within)[0]

    def first(
        self, count: int, *bodies: Body, fresh: bool = False, keep: bool = False, within: Limits = UNLIMITED
    ) -> list[Branch]:
        """The first so many to succeed, as they ended; the others are cancelled. See `gather`."""
        return run_branches(self, bodies, count, fresh=fresh, keep=keep, within=within)

    def gather(
        self, *bodies: Body, fresh: bool = False, keep: bool = False, within: Limits = UNLIMITED
    ) -> list[Branch]:
        """All of them, each called with a fork of this state, at the same time, as `def`, `async def` or program.

        fresh: with an empty state instead. keep: they can be gone on from (`become`), until the run ends or they
        are closed. within: limits of all of them together.
        Raises `ProgramError` if too few succeed, where the failure happened, with all branches as `partial`."""
        branches = run_branches(self, bodies, len(bodies), fresh=fresh, keep=keep, within=within)
        return sorted(branches, key=lambda branch: branch.place)

    # -- tools and retries ------------------------------------------------------------------------------

    def call(self, tool: Tool | Callable[..., Any], /, **arguments: Any) -> Any:
        """A tool's result. Others go on meanwhile, and this state's KV is leased. Raises `ToolError`."""
        own = tool if isinstance(tool, Tool) else make_tool(tool)
        outside, context = self.lane.ground.outside, contextvars.copy_context()
        began = time.monotonic()
        try:
            return self.lane.leased(own.patience, lambda: own.run(arguments, outside, context))
        finally:
            took = m.Usage(total=time.monotonic() - began)
            self.lane.scope.tell("tool", self.lane.path, own.name, took)

    def turn(
        self,
        name: str,
        tools: Toolbox,
        *,
        choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
        **sampling: Any,
    ) -> Turn:
        """An assistant turn that may call tools, as variable `name`; its calls are run, and their results appended
        as a user turn. The state has to have told the model of them (`tools.text`).

        choice: auto, none, required, or a tool's name as in Chat Completions. sampling: as for `sgl.gen`."""
        return take_turn(self, name, tools, choice, parallel, sampling)

    def attempt(self, expression: Any, check: Callable[[State], Any], attempts: Attempts = THREE) -> State:
        """Append what passes a check, which is given a fork with the expression appended, and raises an exception
        if that will not do. Then it is drawn anew, or told what was wrong; in the end `ProgramError` is raised."""
        attempt(self, expression, check, attempts)
        return self
