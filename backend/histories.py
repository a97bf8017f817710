"""Which tokens a text is made of, once the engine has produced or read it.

The stock interpreter sends the whole text with every call. What the engine holds is tokens, and re-tokenising a
text need not give the same ones; so every text that was ever continued or produced is remembered with its
tokens, and a longer text is that history plus the tokens of what follows (`backend.borders`). Forgetting KV
therefore never changes a result, only its cost.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from weft.backend.borders import Border
from weft.runtime.engine.handle import Sequence
from weft.runtime.text.trie import TextTrie


@dataclass
class History:
    """tokens: of the text, BOS included. sequence: holds their KV; None once it was let go. border: how far they
    stay the same in a longer text. forking: forks of it under way, which closing it would cancel."""

    tokens: list[int]
    sequence: Sequence | None
    border: Border
    forking: int = 0


class Histories:
    """Text to history, least recently used first. Owns the sequences it holds; `live` bounds how many.

    Used from one event loop only.
    """

    def __init__(self, live: int, known: int = 4096) -> None:
        self._live = live
        self._texts: TextTrie[History] = TextTrie(known)
        # Those with a sequence, by identity, in the same order of use.
        self._held: OrderedDict[int, History] = OrderedDict()

    def longest_prefix(self, text: str) -> tuple[str, History] | None:
        """The longest remembered text that `text` begins with."""
        found = self._texts.longest_prefix(text)
        if found is None:
            return None
        length, entry = found
        self._used(entry)
        return text[:length], entry

    def longest_held(self, text: str, tokens: list[int]) -> History | None:
        """The held history of the longest beginning of `text` that `tokens`, which are the text's, begin with."""
        for _, entry in self._texts.prefixes(text):
            if entry.sequence is not None and tokens[: len(entry.tokens)] == entry.tokens:
                self._used(entry)
                return entry
        return None

    def put(self, text: str, tokens: list[int], sequence: Sequence | None, border: Border) -> None:
        """Remember. A text keeps the tokens it was first given; later KV for the same tokens may replace none."""
        entry = self._texts.get(text)
        if entry is None:
            entry = History(tokens, sequence, border)
        elif entry.tokens == tokens and entry.sequence is None:
            entry.sequence = sequence
        elif sequence is not None:
            sequence.close()
        for fallen in self._texts.put(text, entry):
            if not fallen.forking:
                self._let_go(fallen)
        self._used(entry)
        self.trim(spare=entry)

    async def fork(self, entry: History) -> Sequence:
        """A sequence of the caller's own from a held one, which stays held meanwhile."""
        assert entry.sequence is not None
        entry.forking += 1
        try:
            return (await entry.sequence.fork())[0]
        finally:
            entry.forking -= 1
            self.trim()

    def release(self, fraction: float = 1.0) -> bool:
        """Let go of the KV of the least recently used histories; False if there was none."""
        idle = self._idle()
        for entry in idle[: max(1, round(len(idle) * fraction))]:
            self._let_go(entry)
        return bool(idle)

    def trim(self, live: int | None = None, spare: History | None = None) -> None:
        """Keep to the bound, or to `live` held histories if that is less; `spare` stays."""
        idle = self._idle()
        bound = self._live if live is None else min(live, self._live)
        for entry in idle[: max(0, len(idle) - bound)]:
            if entry is not spare:
                self._let_go(entry)

    def _idle(self) -> list[History]:
        return [entry for entry in self._held.values() if not entry.forking]

    def _used(self, entry: History) -> None:
        if entry.sequence is not None:
            self._held[id(entry)] = entry
            self._held.move_to_end(id(entry))

    def _let_go(self, entry: History) -> None:
        self._held.pop(id(entry), None)
        if entry.sequence is not None:
            entry.sequence.close()
            entry.sequence = None
