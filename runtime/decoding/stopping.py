"""When an output ends, and how much of its text may be shown meanwhile."""

from __future__ import annotations

from typing import Any

import re2

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError


class StopWatch:
    """Watches one output's text for stop strings and regular expressions.

    `text` is all text kept so far, without what a stop cut off. Regular expressions run on RE2: linear time.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._stops = params.stop
        self._patterns = [_compile(pattern) for pattern in params.stop_regex]
        self._longest = max((len(s) for s in self._stops), default=0)
        self._seen = ""
        self._shown = 0
        self._early = 0

    @property
    def text(self) -> str:
        return self._seen

    def feed(self, piece: str, *, may_stop: bool = True) -> str | None:
        """Add decoded text; return the stop that matched, if any. Then `text` ends before the match."""
        before = len(self._seen)
        self._seen += piece
        if not may_stop:
            self._early = len(self._seen)
            return None
        hits = []
        for stop in self._stops:
            at = self._seen.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                hits.append((at, stop))
        for pattern in self._patterns if piece else ():
            # What was complete before stopping was allowed is no stop.
            match = next((m for m in pattern.finditer(self._seen) if m.end() > self._early), None)
            if match:
                hits.append((match.start(), match.group(0)))
        if not hits:
            return None
        at, stop = min(hits, key=lambda hit: hit[0])
        self._seen = self._seen[:at]
        return stop

    def showable(self, final: bool = False) -> str:
        """New text that no later token can take back; everything left when `final`."""
        end = len(self._seen)
        if not final:
            end = 0 if self._patterns else end - self._held_back()
        piece = self._seen[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(self._seen)), 0, -1):
            tail = self._seen[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False  # the caller is told
    try:
        return re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise RequestError("stop_regex", pattern, "not Unicode text") from None
    except re2.error as error:
        reason = error.args[0].decode(errors="replace")
        raise RequestError("stop_regex", pattern, f"not a regular expression RE2 accepts: {reason}") from None
