"""Parts of a program that run side by side, each with a body of its own: loops, tools, forks and all.

A part's states, its limits and its failures are its own; whoever waits for it decides what they mean. When a part
is cancelled, so is everything below it, and its KV is free within a step of the engine.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.lang.ir import SglFunction

from weft.backend.executor.base import Limits, ProgramError, Scope, joined
from weft.backend.executor.greenlets import drive, spawn
from weft.runtime.errors import Cancelled, DeadlineExceeded, RequestError

if TYPE_CHECKING:
    from weft.backend.executor.state import State

Body = Callable[["State"], Any]  # or a program, with its arguments bound


@dataclass(eq=False)
class Branch:
    """One part, over or under way. place: among the bodies. value: what its body returned. error: why it did not;
    one that others made needless, or that was late, was cancelled."""

    place: int
    state: State
    scope: Scope
    value: Any = None
    error: ProgramError | None = None

    def __getitem__(self, name: str) -> Any:
        """A variable of its state."""
        return self.state[name]

    def close(self) -> None:
        """Give its KV back. Its variables and text stay."""
        self.scope.close()


def run_branches(
    source: State, bodies: Sequence[Body], wanted: int, *, fresh: bool, keep: bool, within: Limits
) -> list[Branch]:
    """Run them until so many have succeeded, or too many have failed (where all are wanted, all come to an end);
    those that succeeded first, as they ended."""
    lane = source.lane
    if not 1 <= wanted <= len(bodies):
        raise RequestError("count", wanted, f"not in 1..{len(bodies)}, the number of bodies")
    whole = Scope(lane.ground, within, lane.scope)
    scopes = [Scope(lane.ground, parent=whole) for _ in bodies]
    lanes = [lane.fresh(scope) for scope in scopes] if fresh else lane.fork(len(bodies), scopes)
    branches = [Branch(place, type(source)(own), own.scope) for place, own in enumerate(lanes)]
    try:
        ended = lane.wait(_race(whole, branches, bodies, wanted))
    except BaseException:
        whole.close()
        raise
    good = [branch for branch in ended if branch.error is None]
    if len(good) < wanted:
        whole.close()
        errors = [branch.error for branch in branches if branch.error is not None]
        raise joined(next((e for e in errors if not isinstance(e.__cause__, Cancelled)), errors[0]), branches)
    if not keep:
        whole.close()
    return good[:wanted]


async def _race(whole: Scope, branches: list[Branch], bodies: Sequence[Body], wanted: int) -> list[Branch]:
    """Those that came to an end, in the order in which they did; the rest was cancelled."""
    tasks = {
        asyncio.ensure_future(_run(branch, body)): branch for branch, body in zip(branches, bodies, strict=True)
    }
    pending, ended, good = set(tasks), [], 0
    reason: Exception = Cancelled("others were sooner")
    try:
        async with asyncio.timeout_at(whole.ends_on_loop()):
            while pending and good < wanted and (wanted == len(tasks) or good + len(pending) >= wanted):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for branch in (branch for task, branch in tasks.items() if task in done):
                    ended.append(branch)
                    good += branch.error is None
    except TimeoutError:
        reason = DeadlineExceeded("the deadline has passed")
    finally:
        needless = [task for task in tasks if not task.done()]
        for task in needless:
            task.cancel()
            tasks[task].close()
        if needless:
            await asyncio.wait(needless)
        for task in needless:
            tasks[task].error = _failure(tasks[task], reason)
    return ended


async def _run(branch: Branch, body: Body) -> None:
    try:
        branch.value = await spawn(run_body, body, branch.state, (), {}, watch=branch.scope.ground.watch)
    except ProgramError as error:
        branch.error = error
    except Exception as error:
        branch.error = _failure(branch, error)


def _failure(branch: Branch, error: Exception) -> ProgramError:
    return ProgramError(branch.scope.ground.program, branch.state.lane.path, None, error)


def run_body(body: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What it returns, once all states of its scope have come to rest; the first that failed fails it."""
    if isinstance(body, SglFunction):
        body, kwargs = body.func, kwargs | body.bind_arguments
    value = body(state, *args, **kwargs)
    if inspect.iscoroutine(value):
        value = drive(value)
    for lane in list(state.lane.scope.lanes):
        lane.sync()
    return value
