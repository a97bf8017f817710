"""What a program sees as `s`: sglang's ProgramState, over a lane in place of a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sglang.lang import ir

from weft.runtime.errors import RequestError, UnsupportedError

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
        """Of a run that has ended; while it runs, errors are raised."""
        return self.lane.error

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

    def __repr__(self) -> str:
        return f"State({self.lane.transcript.text!r})"


class Group(Sequence[State]):
    """The states of one fork."""

    def __init__(self, states: list[State], source: State) -> None:
        self.states, self._source = states, source

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Any:
        return self.states[index]

    def __setitem__(self, index: int, value: State) -> None:
        """What `group[i] += expression` does last."""
        assert self.states[index] is value

    def __iadd__(self, other: Any) -> Group:
        if not isinstance(other, ir.SglExpr | list | tuple) and not callable(other):
            raise RequestError("expression", other, "must be an expression, a list of them or a function of i")
        for i, state in enumerate(self.states):
            own: Any = other
            if isinstance(other, list | tuple):
                own = other[i]
            elif isinstance(other, Callable):  # type: ignore[arg-type]
                own = other(i)
            state += own
        return self

    def join(self, mode: str = "gather_variable") -> None:
        """End the fork: its new variables become lists in the source, or its texts join the source's. The first
        failure among its states is raised, once the others have ended."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise RequestError("mode", mode, "must be gather_variable or concate_and_append")
        lanes, source = [state.lane for state in self.states], self._source.lane
        errors = []
        for lane in lanes:
            try:
                lane.sync()
            except Exception as error:
                errors.append(error)
        if mode == "gather_variable":
            gather(source.variables, [lane.variables for lane in lanes])
        elif not errors:
            source.submit(ir.SglConcateAndAppend(self.states))
            source.sync()
        for lane in lanes:
            lane.close()
        if errors:
            raise errors[0]


def gather(into: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    """Variables that the parts have beside those of `into`, each as the list of its values."""
    before = set(into)
    for part in parts:
        for name in part.keys() - before:
            into.setdefault(name, []).append(part[name])
