"""Drawing again what does not pass: structured output that is cut off, an answer that a test refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.lang import ir

from weft.backend.executor.base import ProgramError
from weft.backend.executor.leaves import generated, leaves
from weft.runtime.errors import ConfigError

if TYPE_CHECKING:
    from weft.backend.executor.state import State


@dataclass(frozen=True)
class Attempts:
    """most: in all. temperature: of generations after the first, where theirs is lower: greedy ones would come
    out as before. feedback: what is appended behind an attempt that did not pass, given why; the next follows it.
    Without, the next one begins where the first did."""

    most: int = 3
    temperature: float = 0.7
    feedback: Callable[[Exception], Any] | None = None

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ConfigError("most", self.most, "must be at least 1")


THREE = Attempts()


def attempt(state: State, expression: Any, check: Callable[[State], Any], policy: Attempts) -> None:
    """Each attempt is on a fork; the state becomes the one that passes."""
    refused: list[Exception] = []
    trial = state.fork(1)[0]
    try:
        for number in range(policy.most):
            trial += expression if policy.feedback or not number else _again(expression, state, policy.temperature)
            trial.sync()
            try:
                check(trial)
            except ProgramError:
                raise
            except Exception as error:
                refused.append(error)
            else:
                state.become(trial)
                return
            if policy.feedback is not None:
                trial += policy.feedback(refused[-1])
            else:
                trial.lane.close()
                trial = state.fork(1)[0]
    finally:
        trial.lane.close()
    lane = state.lane
    name = next((own.name for own in generated(expression)), None)
    failure = ProgramError(lane.ground.program, lane.path, name, refused[-1])
    failure.partial = list(refused)
    raise failure


def _again(expression: Any, state: State, temperature: float) -> ir.SglExprList:
    """The same, drawn more freely."""
    again = []
    for leaf in leaves(expression):
        if isinstance(leaf, ir.SglGen):
            own = leaf.sampling_params.temperature
            default = state.lane.ground.defaults.temperature
            leaf = copy.copy(leaf)
            leaf.sampling_params = copy.copy(leaf.sampling_params)
            leaf.sampling_params.temperature = max(temperature, own if own is not None else default)
        again.append(leaf)
    return ir.SglExprList(again)
