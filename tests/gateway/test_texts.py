"""Long texts are encoded beside the event loop, and what is remembered of texts is bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest

from support.engine import byte_tokenizer
from weft.gateway.apis.texts import Texts
from weft.gateway.chat.encoding import LONG, aside, tokens_of
from weft.runtime.errors import RequestError


def test_long_texts_are_encoded_in_a_thread() -> None:
    async def where(size: int) -> bool:
        return await aside(size, threading.get_ident) == threading.get_ident()

    assert asyncio.run(where(LONG)) and not asyncio.run(where(LONG + 1))


def test_tokens() -> None:
    tokenizer = byte_tokenizer()
    for text in ("", "abc", "xyz " * LONG):
        assert asyncio.run(tokens_of(tokenizer, "prompt", text)) == tokenizer.encode(text)
    with pytest.raises(RequestError, match="prompt"):
        asyncio.run(tokens_of(tokenizer, "prompt", "\ud800"))


def known(texts: Texts, namespace: str, text: str) -> bool:
    """Whether its end has the odd token that was drawn there."""
    tokens = asyncio.run(texts.tokens(namespace, f"{text}ab and more"))
    return tokens != asyncio.run(Texts(byte_tokenizer()).tokens("", f"{text}ab and more"))


def draw(texts: Texts, namespace: str, text: str) -> None:
    """As if another token than the text's own had said the same before it."""
    texts.drawn(namespace, text, [7] * len(text), "ab", byte_tokenizer().encode("ab"))


def test_what_was_drawn_stays_for_its_namespace() -> None:
    texts = Texts(byte_tokenizer())
    draw(texts, "a", "hello")
    assert known(texts, "a", "hello")
    assert not known(texts, "b", "hello") and not known(texts, "a", "hullo")


def test_it_holds_so_many_bytes() -> None:
    texts = Texts(byte_tokenizer(), most=20_000)
    for i in range(50):
        draw(texts, "a", f"{i} " + "x" * 500)
        assert texts.size <= 20_000
    assert known(texts, "a", "49 " + "x" * 500) and not known(texts, "a", "0 " + "x" * 500)
    # Another's are given up before the own.
    for i in range(3):
        draw(texts, "b", f"{i} " + "y" * 500)
    assert all(known(texts, "b", f"{i} " + "y" * 500) for i in range(3)) and not known(
        texts, "a", "49 " + "x" * 500
    )
    for i in range(200):
        draw(texts, str(i), "z")
    assert len(texts._of) <= 64
    draw(texts, "c", "w" * 50_000)  # too long to be held
    assert texts.size <= 20_000 and sum(len(own) for own in texts._of.values()) < 64
