"""Tokens of texts that grow: those that were drawn stay, what is read is encoded as one, however it was cut.

A text that was read in pieces (before a fork, then behind it) has the tokens it would have as a whole. So the last
tokens of what was read are open until more is known; special tokens and drawn ones end what is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weft.runtime.text.tokenizer import Tokenizer


class Border(NamedTuple):
    """How much of a text, and how many of its tokens, no longer change."""

    chars: int
    tokens: int


def encoded(
    tokenizer: Tokenizer, text: str, known: Sequence[int] = (), border: Border | None = None
) -> tuple[list[int], Border]:
    """The tokens of a text and where they end being open; `known` up to `border` are those of its beginning.

    Without, it begins with BOS, unless it spells that out."""
    if border is None:
        border = Border(0, 0)
    tokens = list(known[: border.tokens])
    more = tokenizer.encode(text[border.chars :])
    if not tokens and more[:1] != [tokenizer.bos]:
        tokens = [tokenizer.bos]
    last = max((i for i, token in enumerate(more) if tokenizer.is_special(token)), default=-1)
    if last >= 0:
        spelled = tokenizer.decode([more[last]])
        border = Border(text.rindex(spelled, border.chars) + len(spelled), len(tokens) + last + 1)
    return tokens + more, border


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
        min(len(left), len(right)),
    )


def given_back(tokenizer: Tokenizer, tokens: Sequence[int], border: Border) -> str:
    """The text of the last token, if it is open and a longer token might begin with it; else nothing."""
    if len(tokens) <= border.tokens:
        return ""
    own = tokenizer.token_bytes(tokens[-1])
    longer = any(len(tokenizer.token_bytes(id)) > len(own) for id in tokenizer.beginning(own))
    try:
        return own.decode() if longer else ""
    except UnicodeDecodeError:
        return ""
