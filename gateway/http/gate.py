"""How much is under way: a bounded queue, shared by the callers, and an honest guess at when there will be
room."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from weft.gateway.http.config import Bounds
from weft.gateway.http.errors import HttpError
from weft.gateway.http.keys import Caller


class Gate:
    """Counts requests; the engine decides whose turn it is. served: how many it serves at one time."""

    def __init__(self, bounds: Bounds, served: int) -> None:
        self._most, self._served = bounds.queue, served
        self._share = max(1, int(bounds.queue * bounds.share))
        self._of: Counter[str] = Counter()
        self.under_way = 0
        self.closed = False  # nothing new is let in
        self._seconds = 1.0  # that a request takes, of late

    @property
    def waiting(self) -> int:
        return max(0, self.under_way - self._served)

    @property
    def running(self) -> int:
        return min(self.under_way, self._served)

    @contextmanager
    def enter(self, caller: Caller, weight: int = 1) -> Iterator[None]:
        """weight: generations that it asks for at one time. Raises `HttpError`, 429 or 503, with Retry-After."""
        if self.closed:
            raise HttpError(503, "the server is shutting down", code="draining", retry_after=self.patience())
        if weight > self._share:
            raise HttpError(400, f"{weight} generations at a time; at most {self._share}", code="too_many")
        own = self._of[caller.key]
        if own + weight > self._share and self._share < self._most:
            reason = f"{own} of this key's {self._share} places are taken"
            raise HttpError(429, reason, code="rate_limit_exceeded", retry_after=self._seconds / max(1, own))
        if self.under_way + weight > self._most:
            reason = f"{self.under_way} of {self._most} places in the queue are taken"
            raise HttpError(503, reason, code="overloaded", retry_after=self.patience())
        self._of[caller.key] += weight
        self.under_way += weight
        began = time.monotonic()
        counts = True
        try:
            yield
        except Exception:  # refused, mostly: that took no time, and says nothing of the others
            counts = False
            raise
        finally:
            if counts:
                self._seconds += (time.monotonic() - began - self._seconds) / 16
            self.under_way -= weight
            self._of[caller.key] -= weight
            if not self._of[caller.key]:
                del self._of[caller.key]

    def patience(self) -> float:
        """Seconds until those that wait now have begun, and one more has its turn. Requests took so long of late,
        waits included: in that time as many end as are under way."""
        return self._seconds * (1 + self.waiting) / max(1, self.under_way)
