"""What a server has: made once, shared by all handlers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from weft.gateway.chat.replay import Replay
from weft.gateway.chat.turn import Turns
from weft.gateway.http.config import ServeConfig
from weft.gateway.http.errors import HttpError
from weft.gateway.http.gate import Gate
from weft.gateway.http.metrics import Metrics
from weft.gateway.http.sessions import Sessions
from weft.runtime.engine.front import Engine
from weft.runtime.errors import EngineDead

if TYPE_CHECKING:
    from weft.gateway.http.base import Route

P = TypeVar("P")
_PATIENCE = 2.0  # seconds for the engine to say how full it is
Stage = Literal["starting", "loading", "warming", "ready", "draining"]
_log = logging.getLogger("weft.gateway")


@runtime_checkable
class Closable(Protocol):
    def close(self) -> None: ...


@dataclass
class State:
    """engine: there once its process was begun; requests are served (`serving`) once it has its weights and has
    drawn a token. Owned by the server."""

    config: ServeConfig
    stage: Stage = "starting"
    progress: str = ""
    failure: BaseException | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    routes: Sequence[Route] = ()
    parts: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.metrics = Metrics(self)
        self.kv_usage = 0.0
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise HttpError(503, f"the server is {self.stage}", code=self.stage, retry_after=1.0)
        return self._engine

    def serving(self) -> None:
        """Raises 503 while the model loads."""
        if self.stage in ("starting", "loading", "warming"):
            raise HttpError(503, f"the server is {self.stage}", code=self.stage, retry_after=1.0)

    @property
    def known_engine(self) -> Engine | None:
        return self._engine

    def begin(self, engine: Engine) -> None:
        """It may be loading still."""
        self._engine = engine
        bounds = self.config.bounds
        self.gate = Gate(bounds, engine.slots)
        self.sessions = Sessions(bounds.sessions, bounds.lease)
        self.replay = Replay(bounds.kept_bytes)
        self.turns = Turns(engine, self.replay, self.sessions, self.metrics.generated)

    def part(self, kind: Callable[[State], P]) -> P:
        """What an API keeps on this server; made when it is first asked for."""
        if kind not in self.parts:
            self.parts[kind] = kind(self)
        part: P = self.parts[kind]
        return part

    def close(self) -> None:
        """Let go of what the parts hold."""
        for part in self.parts.values():
            if isinstance(part, Closable):
                part.close()

    async def look(self) -> None:
        """Ask the engine how full it is. What it said last stands while it loads, or is being replaced."""
        if self._engine is None or self.stage not in ("ready", "draining"):
            return
        with suppress(EngineDead, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                self.kv_usage = (await self._engine.stats()).usage

    def go_on(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beyond the request that asked for it; its failure is its own to tell."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a task failed", exc_info=task.exception())
