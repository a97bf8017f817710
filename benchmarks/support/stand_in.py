"""An engine whose core computes nothing: every call ends after a set time, on the loop of its caller."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import os
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine

_LIBC = ctypes.CDLL(None)


class StandIn(Engine):
    """The real front, the embedded model's tokenizer and config, no model. `latency` may be changed meanwhile."""

    def __init__(self, latency: float, tokens: int, deltas: int = 1) -> None:
        """latency: seconds that a generation takes. tokens: that it draws, in so many deltas."""
        self.latency, self.drawn, self.deltas = latency, tokens, deltas
        pools = PoolSizes(tokens=1 << 22, slots=1 << 15)
        super().__init__(EMBEDDED, config=EngineConfig(pools=pools, limits=CoreLimits(queue=1 << 16)))

    def _connect(self, *_: Any) -> Any:
        return Core(self, self._deliver)


class Core:
    """Stands where a link to a core would: knows lengths of histories, and which calls are under way."""

    def __init__(self, engine: StandIn, deliver: Callable[[m.Event], None]) -> None:
        self._engine, self._deliver = engine, deliver
        self.lengths: dict[int, int] = {}
        self.calls: set[int] = set()
        self._clocks: WeakKeyDictionary[asyncio.AbstractEventLoop, Clock] = WeakKeyDictionary()

    def close(self) -> None:
        self.lengths.clear()

    def send(self, message: m.Request) -> None:
        match message:
            case m.Open(sequence, tokens):
                self.lengths[sequence] = len(tokens)
            case m.Extend(sequence, tokens):
                self.lengths[sequence] += len(tokens)
            case m.Close(sequence):
                self.lengths.pop(sequence, None)
            case m.Cancel(call):
                self.calls.discard(call)
            case m.Truncate(call, sequence, length):
                self.lengths[sequence] = length
                self._in(0, call, m.Done(call=call, usage=m.Usage(), length=length))
            case m.Fork(call, sequence, children):
                for child in children:
                    self.lengths[child] = self.lengths[sequence]
                self._in(0, call, m.Done(call=call, usage=m.Usage(), length=self.lengths[sequence]))
            case m.Score(call, sequence, tokens):
                self.lengths[sequence] += len(tokens)
                scored = [m.Logprob(token, -1.0) for token in tokens]
                done = m.Done(call=call, usage=m.Usage(), length=self.lengths[sequence], logprobs=scored)
                self._in(self._engine.latency / 4, call, done)
            case m.Generate(call, sequence):
                self._generate(call, sequence, 1)

    def _generate(self, call: int, sequence: int, number: int) -> None:
        engine = self._engine
        each = engine.drawn // engine.deltas
        delta = m.Delta(call=call, tokens=[262 + call % 64] * each, text=" word" * each)
        self._in(engine.latency / engine.deltas, call, delta, lambda: self._more(call, sequence, number))

    def _more(self, call: int, sequence: int, number: int) -> None:
        engine = self._engine
        if number < engine.deltas:
            self._generate(call, sequence, number + 1)
            return
        length = self.lengths.get(sequence, 0) + engine.drawn
        self.lengths[sequence] = length
        usage = m.Usage(history=length, generated=engine.drawn, total=engine.latency)
        self._deliver(m.Done(call=call, usage=usage, length=length, finish_reason="length", kept=engine.drawn))

    def _in(self, seconds: float, call: int, event: m.Event, then: Callable[[], None] | None = None) -> None:
        def fire() -> None:
            if call in self.calls:
                self.calls.discard(call)
                self._deliver(event)
                if then is not None:
                    then()

        self.calls.add(call)
        loop = asyncio.get_running_loop()
        if loop not in self._clocks:
            self._clocks[loop] = Clock(loop)
        self._clocks[loop].at(time.perf_counter() + seconds, fire)


class Clock:
    """Timers of a loop by the kernel's own: the loop's are late by up to a millisecond, to which its waits are
    rounded up. Linux only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._fd = _LIBC.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        loop.add_reader(self._fd, self._tick)

    def at(self, due: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (due, next(self._count), then))
        if self._heap[0][0] == due:
            self._arm()

    def _arm(self) -> None:
        left = max(self._heap[0][0] - time.perf_counter(), 1e-6)
        spec = (ctypes.c_long * 4)(
            0, 0, int(left), int(left % 1 * 1e9)
        )  # no interval, then seconds and nanoseconds
        _LIBC.timerfd_settime(self._fd, 0, spec, None)

    def _tick(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set anew since it rang
            os.read(self._fd, 8)
        now = time.perf_counter()
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2]()
        if self._heap:
            self._arm()
