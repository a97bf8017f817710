"""Conversations, told by what clients send anyway. Between their turns, while a tool runs or somebody types, the
KV of the last turn is leased: others give way first. It changes what is computed again, never a result."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping

from weft.runtime.engine.handle import Sequence

# What agents and routers send to name a conversation, the most precise first: sub-agents have prefixes of their
# own.
HEADERS = (
    "x-claude-code-agent-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-session-id",
    "x-session-affinity",
    "x-dynamo-session-id",
    "x-smg-routing-key",
)
_FINAL = "x-dynamo-session-final"


def session_of(headers: Mapping[str, str], *named: str | None) -> str | None:
    """named: what the body says, which comes first."""
    for name in (*named, *(headers.get(header) for header in HEADERS)):
        if name:
            return name
    return None


def is_final(headers: Mapping[str, str]) -> bool:
    """Whether the client says that the conversation ends here."""
    return headers.get(_FINAL, "").lower() in ("true", "1")


class Sessions:
    """Leases, at most so many, the longest unused given up first. Used from one event loop."""

    def __init__(self, most: int, lease: float) -> None:
        self._most, self._lease = most, lease
        self._held: OrderedDict[tuple[str, str], tuple[Sequence, asyncio.TimerHandle]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, namespace: str, session: str, sequence: Sequence, seconds: float | None = None) -> None:
        """Lease the KV of its latest turn. Takes the sequence over, and closes the one of the turn before."""
        seconds = self._lease if seconds is None else seconds
        self.end(namespace, session)
        if not self._most or not seconds:
            sequence.close()
            return
        key = namespace, session
        sequence.pin(seconds)
        timer = asyncio.get_running_loop().call_later(seconds, self.end, namespace, session)
        self._held[key] = sequence, timer
        while len(self._held) > self._most:
            self.end(*next(iter(self._held)))

    def end(self, namespace: str, session: str) -> None:
        held = self._held.pop((namespace, session), None)
        if held is not None:
            held[1].cancel()
            held[0].close()

    def clear(self) -> None:
        for key in list(self._held):
            self.end(*key)
