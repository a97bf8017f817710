"""Which tokens a text is made of, once the engine has produced or read it.

The stock interpreter sends the whole text with every call. What the engine holds is tokens, and re-tokenising a
text need not give the same ones; so every text that was ever continued or produced is remembered with its
tokens, and a longer text is that history plus the tokens of what follows. Forgetting KV therefore never changes
a result, only its cost.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from weft.runtime.engine.front import Sequence


@dataclass
class History:
    """tokens: of the text, BOS included. sequence: holds their KV; None once it was let go."""

    tokens: list[int]
    sequence: Sequence | None


class Histories:
    """Text to history, least recently used first. Owns the sequences it holds; `live` bounds how many.

    Used from one event loop only.
    """

    def __init__(self, live: int, known: int = 4096) -> None:
        self._live = live
        self._known = known
        self._entries: OrderedDict[str, History] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def longest_prefix(self, text: str) -> tuple[str, History] | None:
        """The longest remembered text that `text` begins with."""
        for length in sorted((n for n in self._lengths if n <= len(text)), reverse=True):
            prefix = text[:length]
            entry = self._entries.get(prefix)
            if entry is not None:
                self._entries.move_to_end(prefix)
                return prefix, entry
        return None

    def put(self, text: str, tokens: list[int], sequence: Sequence | None) -> None:
        """Remember. A text keeps the tokens it was first given; later KV for the same tokens may replace none."""
        entry = self._entries.get(text)
        if entry is None:
            self._entries[text] = History(tokens, sequence)
            self._lengths[len(text)] += 1
        elif entry.tokens == tokens and entry.sequence is None:
            entry.sequence = sequence
        elif sequence is not None:
            sequence.close()
        self._entries.move_to_end(text)
        self._trim()

    def release(self, fraction: float = 1.0) -> bool:
        """Let go of the KV of the least recently used histories; False if there was none."""
        held = [entry for entry in self._entries.values() if entry.sequence is not None]
        for entry in held[: max(1, round(len(held) * fraction))]:
            _close(entry)
        return bool(held)

    def _trim(self) -> None:
        held = [entry for entry in self._entries.values() if entry.sequence is not None]
        for entry in held[: max(0, len(held) - self._live)]:
            _close(entry)
        while len(self._entries) > self._known:
            text, entry = self._entries.popitem(last=False)
            _close(entry)
            self._lengths[len(text)] -= 1
            if not self._lengths[len(text)]:
                del self._lengths[len(text)]


def _close(entry: History) -> None:
    if entry.sequence is not None:
        entry.sequence.close()
        entry.sequence = None
