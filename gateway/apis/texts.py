"""Which tokens texts are made of that clients of `/generate` send back longer: drawn tokens stay as they were
drawn."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from weft.backend.borders import Border, encoded
from weft.gateway.chat.encoding import aside, check_text
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.trie import TextTrie

_FIXED = 512  # bytes of a text beside its own
_NAMESPACES = 64
_KNOWN = 4096  # texts of each
_BYTES = 1 << 26  # of all texts


class _Known(NamedTuple):
    text: str
    tokens: array[int]
    border: Border

    @property
    def size(self) -> int:
        return 2 * len(self.text) + self.tokens.itemsize * len(self.tokens) + _FIXED


class Texts:
    """Of each namespace its own, up to so many bytes in all: the namespace that drew nothing for longest goes
    first, then texts of the one that is left. Used from one event loop."""

    def __init__(self, tokenizer: Tokenizer, most: int = _BYTES) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._of: OrderedDict[str, TextTrie[_Known]] = OrderedDict()
        self.size = 0  # bytes that are held, about

    async def tokens(self, namespace: str, text: str) -> list[int]:
        """A BOS comes first, unless the text spells it out."""
        check_text("text", text)
        known = self._of.get(namespace)
        found = None if known is None else known.longest_prefix(text)
        if found is None:
            return (await aside(len(text), lambda: encoded(self._tokenizer, text)))[0]
        _, (_, tokens, border) = found
        return (await aside(len(text), lambda: encoded(self._tokenizer, text, tokens, border)))[0]

    def drawn(self, namespace: str, prompt: str, before: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        """Behind a prompt of the tokens `before`, these were drawn, and gave the text."""
        said = self._tokenizer.decode(list(tokens))
        rest = self._tokenizer.encode(text[len(said) :])
        border = Border(len(prompt) + len(said), len(before) + len(tokens))
        known = self._of.setdefault(namespace, TextTrie(_KNOWN))
        self._of.move_to_end(namespace)
        if known.get(prompt + text) is not None:
            return
        new = _Known(prompt + text, array("i", [*before, *tokens, *rest]), border)
        self.size += new.size
        self._forget(known.put(new.text, new))
        while len(self._of) > _NAMESPACES or (self.size > self._most and len(self._of) > 1):
            self._forget(self._of.popitem(last=False)[1].values())
        while self.size > self._most:
            self._forget([known.remove(next(known.values()).text)])

    def _forget(self, fallen: Iterable[_Known]) -> None:
        self.size -= sum(own.size for own in fallen)
