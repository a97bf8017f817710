"""Where histories part: at the borders of turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import ASSISTANT, USER


def turn_cuts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Lengths at which a history in V4's chat format may be continued otherwise: before each user turn, and where
    an assistant turn opens, before the token that says whether it thinks."""
    user, assistant = _markers(tokenizer)
    cuts = []
    for place, token in enumerate(tokens):
        if token == user and place:
            cuts.append(place)
        elif token == assistant:
            cuts.append(place + 1)
    return cuts


@lru_cache(16)
def _markers(tokenizer: Tokenizer) -> tuple[int, int]:
    user, assistant = tokenizer.encode(USER), tokenizer.encode(ASSISTANT)
    assert len(user) == len(assistant) == 1, "V4's markers are single tokens"
    return user[0], assistant[0]
