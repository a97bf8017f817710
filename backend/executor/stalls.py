"""Who holds the loop: programs are meant to wait, not to compute, while thousands of others share their thread."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

_LOG = logging.getLogger("weft.executor")
_OWN = str(Path(__file__).parent)


@dataclass(frozen=True)
class Stall:
    """A program's own code ran for so many seconds without waiting. file, line: where it was seen."""

    program: str
    file: str
    line: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.program} held the loop for {self.seconds:.2f} s at {self.file}:{self.line}"


class Watchman:
    """A thread that looks after one loop's thread. Owned by its executor; begins with the first program."""

    def __init__(self, limit: float, report: Callable[[Stall], None] | None) -> None:
        """limit: seconds that a program may hold the loop. report: called on the loop for each stall once it is
        over; it is logged as a warning in any case, while it lasts."""
        self._limit, self._report = limit, report
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._watched = 0
        self._since: tuple[float, Watch] | None = None
        self._seen: tuple[float, str, int] | None = None

    def watch(self, program: str, code: CodeType) -> Watch:
        """Of a program that will run in this thread."""
        if self._thread is None:
            self._watched = threading.get_ident()
            self._thread = threading.Thread(target=self._look, name="weft-stalls", daemon=True)
            self._thread.start()
        return Watch(self, program, code)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def begins(self, watch: Watch) -> None:
        self._since = time.monotonic(), watch

    def ends(self) -> None:
        assert self._since is not None
        (since, watch), self._since = self._since, None
        seconds = time.monotonic() - since
        if seconds > self._limit:
            seen = self._seen
            file, line = watch.code.co_filename, watch.code.co_firstlineno
            if seen is not None and seen[0] == since:
                _, file, line = seen
            stall = Stall(watch.program, file, line, seconds)
            if self._report is not None:
                self._report(stall)

    def _look(self) -> None:
        while not self._stop.wait(self._limit / 4):
            now = self._since
            if now is None or (self._seen is not None and self._seen[0] == now[0]):
                continue
            since, watch = now
            seconds = time.monotonic() - since
            frame = sys._current_frames().get(self._watched)
            if seconds > self._limit and frame is not None:
                file, line = _place(frame, watch.code)
                self._seen = since, file, line
                _LOG.warning("%s", Stall(watch.program, file, line, seconds))


class Watch:
    """Of one program. code: its function's."""

    def __init__(self, watchman: Watchman, program: str, code: CodeType) -> None:
        self._watchman, self.program, self.code = watchman, program, code

    def begins(self) -> None:
        """Its code runs now."""
        self._watchman.begins(self)

    def ends(self) -> None:
        """It waits, or has come to its end."""
        self._watchman.ends()


def _place(frame: FrameType, code: CodeType) -> tuple[str, int]:
    """The innermost line of the program's file, or else of any that is not the executor's."""
    found: tuple[str, int] | None = None
    current: FrameType | None = frame
    while current is not None:
        file = current.f_code.co_filename
        if file == code.co_filename:
            return file, current.f_lineno
        if found is None and not file.startswith(_OWN):
            found = file, current.f_lineno
        current = current.f_back
    return found or (code.co_filename, code.co_firstlineno)
