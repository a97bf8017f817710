"""Which tokens a text is made of, once the engine has produced or read it.

The stock interpreter sends the whole text with every call. What the engine holds is tokens, and re-tokenising a
text need not give the same ones; so every text that was ever continued or produced is remembered with its
tokens, and a longer text is that history plus the tokens of what follows. Forgetting KV therefore never changes
a result, only its cost.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from weft.runtime.engine.handle import Sequence
from weft.runtime.text.trie import TextTrie


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

    def nearest_held(self, text: str, tokens: list[int]) -> History | None:
        """The longest history with KV that is a beginning of this text and of its tokens."""
        for _, entry in self._texts.prefixes(text):
            if entry.sequence is not None and entry.tokens == tokens[: len(entry.tokens)]:
                self._used(entry)
                return entry
        return None

    def put(self, text: str, tokens: list[int], sequence: Sequence | None) -> None:
        """Remember. A text keeps the tokens it was first given; later KV for the same tokens may replace none."""
        entry = self._texts.get(text)
        if entry is None:
            entry = History(tokens, sequence)
        elif entry.tokens == tokens and entry.sequence is None:
            entry.sequence = sequence
        elif sequence is not None:
            sequence.close()
        for fallen in self._texts.put(text, entry):
            self._let_go(fallen)
        self._used(entry)
        while len(self._held) > self._live:
            self._let_go(next(iter(self._held.values())))

    def release(self, fraction: float = 1.0) -> bool:
        """Let go of the KV of the least recently used histories; False if there was none."""
        held = list(self._held.values())
        for entry in held[: max(1, round(len(held) * fraction))]:
            self._let_go(entry)
        return bool(held)

    def _used(self, entry: History) -> None:
        if entry.sequence is not None:
            self._held[id(entry)] = entry
            self._held.move_to_end(id(entry))

    def _let_go(self, entry: History) -> None:
        self._held.pop(id(entry), None)
        if entry.sequence is not None:
            entry.sequence.close()
            entry.sequence = None
