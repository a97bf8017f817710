"""Between an engine's front and its core: in a thread of this process, or in a process of its own.

A link carries messages one way and events the other, notices when the core dies, and replaces it. What the dead
core held is gone: its sequences are unknown to the new one, and calls on them fail with `EngineDead`.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Protocol

import msgspec

from weft.runtime.engine import messages as m
from weft.runtime.errors import EngineDead

if TYPE_CHECKING:
    from weft.runtime.engine.core import Core

_log = logging.getLogger("weft")
_GRACE = 5.0  # seconds that a core's process has to end by itself

OnEvent = Callable[[m.Event], None]
OnEvents = Callable[[Sequence[m.Event]], None]  # of one step
OnDeath = Callable[[EngineDead, bool], None]  # the reason, and whether it is for good
MakeCore = Callable[[OnEvent], "Core"]
ChildMain = Callable[[Connection], None]


class Link(Protocol):
    def send(self, message: m.Request) -> None:
        """Hand a message to the core; never blocks."""

    def close(self) -> None:
        """End the core. Calls still waiting get their `Cancelled` first."""


def run_core(core: Core, receive: Callable[[bool], m.Request | None]) -> None:
    """Messages first, then a step, until `Stop`. receive(block) gives the next message, None if there is none."""
    while True:
        message = receive(not core.has_work())
        while message is not None:
            core.handle(message)
            if isinstance(message, m.Stop):
                return
            message = receive(False)
        if core.has_work():
            core.step()


class ThreadLink:
    """A core in a daemon thread. After a crash the same model goes on with fresh state."""

    def __init__(self, make: MakeCore, on_event: OnEvent, on_death: OnDeath, restarts: int) -> None:
        self._make = make
        self._on_event = on_event
        self._on_death = on_death
        self._restarts = restarts
        self.inbox: queue.SimpleQueue[m.Request] = queue.SimpleQueue()
        self.core = make(on_event)
        self._thread = threading.Thread(target=self._run, name="weft-core", daemon=True)
        self._thread.start()

    def send(self, message: m.Request) -> None:
        self.inbox.put(message)

    def close(self) -> None:
        self.inbox.put(m.Stop())
        self._thread.join()

    def _receive(self, block: bool) -> m.Request | None:
        try:
            return self.inbox.get(block)
        except queue.Empty:
            return None

    def _run(self) -> None:
        while True:
            try:
                run_core(self.core, self._receive)
                return
            except BaseException as error:
                if not self._replace(error):
                    return

    def _replace(self, error: BaseException) -> bool:
        """A new core, if the crash was not the last one allowed."""
        reason = EngineDead(f"the engine core stopped: {error!r}")
        _log.error("the engine core stopped:\n%s", "".join(traceback.format_exception(error)))
        error.__traceback__ = None  # its frames hold the dead core, and that its pools
        reason.__cause__ = error
        self._restarts -= 1
        final = self._restarts < 0 or not isinstance(error, Exception)
        self._on_death(reason, final)  # at once: new pools may take long to make
        if final:
            return False
        del self.core  # its pools go before the new ones are made
        try:
            self.core = self._make(self._on_event)
        except Exception as second:
            self._on_death(EngineDead(f"{reason}, and could not be replaced: {second!r}"), True)
            return False
        return True


class ProcessLink:
    """A core in a spawned process; messages travel as msgpack over a pipe.

    child: picklable; loads the model and runs the core on its end of the pipe. A dead process is noticed at once
    (its end of the pipe closes) and replaced; messages sent meanwhile wait for the new one.
    """

    def __init__(self, child: ChildMain, on_events: OnEvents, on_death: OnDeath, restarts: int) -> None:
        self._child = child
        self._on_events = on_events
        self._on_death = on_death
        self._restarts = restarts
        self._closing = False
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        self.process, pipe = self._spawn()
        self._reader = threading.Thread(target=self._run, args=(pipe,), name="weft-core-link", daemon=True)
        self._reader.start()

    def send(self, message: m.Request) -> None:
        self._outbox.put(self._encoder.encode(message))

    def close(self) -> None:
        self._closing = True
        self.send(m.Stop())
        self._reader.join(_GRACE)
        while self._reader.is_alive():  # a core that is loading, or stuck; or one that has just been started
            self.process.kill()
            self._reader.join(0.1)

    def _spawn(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=self._child, args=(theirs,), name="weft-core", daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the child does
        return process, ours

    def _run(self, pipe: Connection) -> None:
        try:
            self._supervise(pipe)
        except Exception as error:  # no process to be had, or an answer that is none
            _log.exception("the engine core cannot be kept running")
            self._on_death(EngineDead(f"the engine core could not be replaced: {error!r}"), True)

    def _supervise(self, pipe: Connection) -> None:
        """Read events until the child is gone; replace it unless that was wanted."""
        while True:
            outbox = self._outbox
            writer = threading.Thread(target=_write, args=(pipe, outbox), name="weft-core-send", daemon=True)
            writer.start()
            self._read(pipe)
            self.process.join()
            final = self._closing or self._restarts == 0
            if not final:
                self._restarts -= 1
                self._outbox = queue.SimpleQueue()
            outbox.put(None)
            writer.join()
            pipe.close()
            if not self._closing:
                reason = EngineDead(f"the engine core's process ended with exit code {self.process.exitcode}")
                self._on_death(reason, final)
            if final or self._closing:
                return
            self.process, pipe = self._spawn()

    def _read(self, pipe: Connection) -> None:
        decoder = msgspec.msgpack.Decoder(list[m.Event])
        while True:
            try:
                data = pipe.recv_bytes()
            except (EOFError, ConnectionResetError):
                return
            self._on_events(decoder.decode(data))


def _write(pipe: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    while (data := outbox.get()) is not None:
        try:
            pipe.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # the reader notices the death and tells everyone
