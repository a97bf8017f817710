"""Runs: made by the executor, told of as they are made, kept when they have ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sglang.lang.ir import SglFunction

from weft.backend.executor import Limits, Piece, ProgramError, ProgramExecutor, Run, Took
from weft.gateway.chat.base import receipt
from weft.gateway.http.keys import Caller
from weft.gateway.http.shelf import Shelf
from weft.gateway.http.state import State
from weft.gateway.runs.registry import Registry
from weft.gateway.runs.types import RunError, RunEvent, RunInfo, RunOptions, RunReceipt, RunUsage
from weft.runtime.errors import Overloaded, RequestError

_LONGEST = 2000  # characters of an error
_EVENTS = 1 << 14  # of a run, from which on pieces wait until they are longer
_FIXED = 384  # bytes of an event beside its text
_PIECE = 1024  # characters of those


@dataclass(eq=False)
class Kept:
    """A run and its events, which do not change once they are told. Owned by the key that made it. task: what
    makes it; who cancels that has cancelled the run."""

    info: RunInfo
    owner: str
    background: bool
    events: list[RunEvent] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None
    ended: bool = False
    size: int = 2048
    _held: RunEvent | None = None  # a piece that is not told yet
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def under_way(self) -> bool:
        return not self.ended

    def tell(self, event: RunEvent) -> None:
        """In a run of very many events short pieces of the same text are told as one."""
        held, self._held = self._held, None
        if held is not None and not _continues(held, event):
            self._tell(held)
        elif held is not None:
            event.text = (held.text or "") + (event.text or "")
        if event.type == "piece" and len(self.events) >= _EVENTS and len(event.text or "") < _PIECE:
            self._held = event
        else:
            self._tell(event)

    def _tell(self, event: RunEvent) -> None:
        event.id = len(self.events)
        self.events.append(event)
        self.size += _FIXED + len(event.text or "")
        self._wake()

    def end(self) -> None:
        """As `info` says. Safe to call twice."""
        if self.ended:
            return
        self.ended = True
        self.size += len(msgspec.json.encode(self.info))
        self.tell(RunEvent(type="ended", run=self.info))

    async def follow(self, start: int) -> AsyncIterator[RunEvent]:
        """Events from this one on, until the last."""
        while True:
            while start < len(self.events):
                yield self.events[start]
                start += 1
            if self.ended:
                return
            await self._more.wait()

    async def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
            if not self.task.cancelled():
                self.task.exception()  # was told, or its client has left
        if not self.ended:  # its task had not begun
            self.info.status = "cancelled"
            self.end()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


def _continues(held: RunEvent, event: RunEvent) -> bool:
    same = (held.path, held.variable, held.index) == (event.path, event.variable, event.index)
    return event.type == "piece" and same


class Runs:
    """Of one server. Also what its programs are run by."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.registry = Registry(state.config.programs)
        self._executor = ProgramExecutor(state.engine, thinking=state.config.thinking)
        self.shelf: Shelf[Kept] = Shelf("run", state.config.bounds.kept, state.config.bounds.kept_bytes)

    def close(self) -> None:
        self._executor.close()

    def begin(self, caller: Caller, name: str, tag: str, hash: str, asked: RunOptions) -> Kept:
        info = RunInfo(
            id=f"run_{secrets.token_hex(16)}",
            program=name,
            tag=tag,
            hash=hash,
            status="queued",
            created_at=time.time(),
            metadata=asked.metadata,
        )
        kept = Kept(info, caller.key, asked.background)
        self.shelf.put(info.id, kept)
        return kept

    async def make(
        self, kept: Kept, program: SglFunction, arguments: Mapping[str, Any], asked: RunOptions, namespace: str
    ) -> None:
        """To its end, whatever that is; what it is then stands in `kept.info`. Raises only when it is cancelled,
        or for a run that was never begun (`Overloaded`) and whose client is there to be told."""
        info = kept.info
        info.status = "running"
        kept.tell(RunEvent(type="started", run=msgspec.structs.replace(info, usage=RunUsage())))
        limits = Limits(seconds=asked.limits.seconds, tokens=asked.limits.tokens)
        given = {**_sampling(asked), **arguments}
        try:
            run = await self._executor.of(namespace).follow(
                program, given, within=limits, emit=_piece_to(kept), told=self._took_to(kept)
            )
            _completed(info, run)
        except asyncio.CancelledError:
            info.status = "cancelled"
            raise
        except Exception as error:
            info.status, info.error = "failed", _error(error)
            if isinstance(error, Overloaded) and not info.usage.receipts and not kept.background:
                self.shelf.forget(info.id)
                raise
        finally:
            info.ended_at = time.time()
            kept.end()

    def _took_to(self, kept: Kept) -> Any:
        usage = kept.info.usage

        def told(took: Took) -> None:
            if took.kind == "tool":
                usage.tools += 1
                own = RunReceipt(kind="tool", path=took.path, name=took.name, seconds=took.usage.total)
            else:
                costs = receipt(took.usage)
                own = RunReceipt(kind=took.kind, path=took.path, name=took.name, took=costs)
                usage.replayed_tokens += costs.replayed
                usage.computed_tokens += costs.computed
                usage.copied_bytes += costs.copied_bytes
                if took.kind == "gen":
                    usage.generations += 1
                    usage.prompt_tokens += costs.prompt
                    usage.cached_tokens += costs.cached
                    usage.generated_tokens += costs.generated
                    usage.seconds += costs.total
                    self._state.metrics.generated(costs)
            usage.receipts.append(own)
            kept.tell(RunEvent(type="receipt", receipt=own))

        return told


def _sampling(asked: RunOptions) -> dict[str, Any]:
    return {k: v for k, v in msgspec.to_builtins(asked.sampling).items() if v is not None}


def _piece_to(kept: Kept) -> Any:
    def emit(piece: Piece) -> None:
        if piece.text:
            event = RunEvent(type="piece", path=piece.path, variable=piece.variable, text=piece.text)
            event.index = piece.index
            kept.tell(event)

    return emit


def _completed(info: RunInfo, run: Run) -> None:
    info.status = "completed"
    info.variables = {name: as_json(value) for name, value in run.state.lane.variables.items()}
    info.value, info.text = as_json(run.value), run.text()


def _error(error: Exception) -> RunError:
    if isinstance(error, ProgramError):
        cause = error.__cause__ or error
        return RunError(type=type(cause).__name__, message=str(error), path=error.path, variable=error.variable)
    return RunError(type=type(error).__name__, message=str(error)[:_LONGEST])


def as_json(value: Any) -> Any:
    """The value if it is JSON; what cannot be is told by its type and text."""
    try:
        return msgspec.to_builtins(value, str_keys=True)
    except (TypeError, ValueError, RequestError):
        return {"type": type(value).__name__, "text": repr(value)[:1000]}
