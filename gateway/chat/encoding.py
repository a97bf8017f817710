"""Texts to tokens, the long ones beside the event loop: others are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer

T = TypeVar("T")
LONG = 1 << 14  # characters, which take some ten milliseconds


async def aside(size: int, work: Callable[[], T]) -> T:
    """Do it in a thread, if it has so many characters to go through that others would notice."""
    return await asyncio.to_thread(work) if size > LONG else work()


def check_text(field: str, text: str) -> None:
    """Raises `RequestError` for what cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(field, text, "not Unicode text") from None


async def tokens_of(tokenizer: Tokenizer, field: str, text: str) -> list[int]:
    """As `Engine.tokens`."""
    check_text(field, text)
    return await aside(len(text), lambda: tokenizer.encode(text))
