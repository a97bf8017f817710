"""Which tokens texts are made of that clients of `/generate` send back longer: drawn tokens stay as they were
drawn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from weft.backend.borders import Border, encoded
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.trie import TextTrie

_NAMESPACES = 64
_KNOWN = 4096  # texts of each


class Texts:
    """Of each namespace its own. Used from one event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._of: OrderedDict[str, TextTrie[tuple[list[int], Border]]] = OrderedDict()

    def tokens(self, namespace: str, text: str) -> list[int]:
        """A BOS comes first, unless the text spells it out."""
        found = self._known(namespace).longest_prefix(text)
        if found is None:
            return encoded(self._tokenizer, text)[0]
        _, (tokens, border) = found
        return encoded(self._tokenizer, text, tokens, border)[0]

    def drawn(self, namespace: str, prompt: str, before: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        """Behind a prompt of the tokens `before`, these were drawn, and gave the text."""
        said = self._tokenizer.decode(list(tokens))
        rest = self._tokenizer.encode(text[len(said) :])
        border = Border(len(prompt) + len(said), len(before) + len(tokens))
        known = self._known(namespace)
        if known.get(prompt + text) is None:
            known.put(prompt + text, ([*before, *tokens, *rest], border))

    def _known(self, namespace: str) -> TextTrie[tuple[list[int], Border]]:
        if namespace not in self._of:
            self._of[namespace] = TextTrie(_KNOWN)
            while len(self._of) > _NAMESPACES:
                self._of.popitem(last=False)
        self._of.move_to_end(namespace)
        return self._of[namespace]
