"""The states of one fork, and their join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.lang import ir

from weft.backend.executor.base import ProgramError, joined
from weft.runtime.errors import RequestError

if TYPE_CHECKING:
    from weft.backend.executor.state import State


class Group(Sequence["State"]):
    """The states of one fork. Owned by their source's run, which ends those that nobody joins."""

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
        if not isinstance(other, str | ir.SglExpr | list | tuple) and not callable(other):
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
        failure among its states is raised, once the others have ended; `partial` has what each of them made."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise RequestError("mode", mode, "must be gather_variable or concate_and_append")
        lanes, source = [state.lane for state in self.states], self._source.lane
        errors: list[ProgramError] = []
        for lane in lanes:
            try:
                lane.sync()
            except ProgramError as error:
                errors.append(error)
        before = set(source.variables)
        if mode == "gather_variable":
            gather(source.variables, [lane.variables for lane in lanes])
        elif not errors:
            source.submit(ir.SglConcateAndAppend(self.states))
            source.sync()
        for lane in lanes:
            lane.close()
        if errors:
            own = [{name: v for name, v in lane.variables.items() if name not in before} for lane in lanes]
            raise joined(errors[0], own)


def gather(into: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    """Variables that the parts have beside those of `into`, each as the list of its values."""
    before = set(into)
    for part in parts:
        for name in part.keys() - before:
            into.setdefault(name, []).append(part[name])
