"""Dialogues as the tokens that the product lays out, with the tokens that a model learns.

The layout is that of `weft.runtime.text.chat`, written out here because training needs thousands of dialogues a
second; the tests hold the two together, turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import NamedTuple

from weft.runtime.embedded.dialogue import Example, tool
from weft.runtime.text.chat import render
from weft.runtime.text.tokenizer import Tokenizer, byte_tokenizer
from weft.runtime.text.tokens import ASSISTANT, BOS, DSML, EOS, LEADING, THINK_END, THINK_START, TRAILING, USER

Segment = tuple[str, bool]  # text, and whether it is a special token


class Encoded(NamedTuple):
    """tokens: of a whole dialogue. learn: for each, whether an assistant turn draws it, its EOS included."""

    tokens: list[int]
    learn: list[bool]


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Segment by segment, as the product does."""
    tokens: list[int] = []
    learn: list[bool] = []
    drawn = False
    for text, control in segments(example):
        ids = _segment(tokenizer, text, control) if len(text) < _SHORT else tokenizer.encode_plain(text)
        opening = drawn and tokens[-1] == _segment(tokenizer, ASSISTANT, True)[0]
        tokens += ids
        learn += [drawn and not opening] * len(ids)
        drawn = text == ASSISTANT or (drawn and text != EOS) if control else drawn
    return Encoded(tokens, learn)


_SHORT = 2000


@lru_cache(1 << 14)
def _segment(tokenizer: Tokenizer, text: str, control: bool) -> list[int]:
    return tokenizer.encode(text) if control else tokenizer.encode_plain(text)


def segments(example: Example) -> list[Segment]:
    """All turns, in special tokens and the text between them."""
    return _joined(_parts(example))


def _parts(example: Example) -> Iterator[Segment]:
    yield BOS, True
    messages = example.messages
    if messages[0]["role"] == "system":
        yield messages[0]["content"], False
    if example.tools:
        head, tail = frame(messages[0]["role"] == "system")
        yield from head
        yield "\n".join(json.dumps(declared["function"]) for declared in example.tools), False
        yield from tail
    thinks = {scored.turn: scored.thinking for scored in example.scored}
    for i, message in enumerate(messages):
        content = message["content"]
        match message["role"]:
            case "user":
                yield from ((USER, True), (content, False))
            case "tool":
                yield from ((USER, True), (f"<tool_result>{content}</tool_result>", False))
            case "assistant":
                yield ASSISTANT, True
                if thinks[i]:
                    yield from ((THINK_START, True), (message["reasoning_content"], False))
                yield from ((THINK_END, True), (content, False))
                for call in message.get("tool_calls", ()):
                    yield from _call(call["function"])
                yield EOS, True


def _call(function: Mapping[str, str]) -> Iterator[Segment]:
    """The only call of a turn; its arguments are strings."""
    dsml = (DSML, True)
    yield from (("\n\n<", False), dsml, ("tool_calls>\n<", False), dsml)
    yield f'invoke name="{function["name"]}">\n<', False
    for name, value in json.loads(function["arguments"]).items():
        yield from (
            dsml,
            (f'parameter name="{name}" string="true">{value}</', False),
            dsml,
            ("parameter>\n", False),
        )
        yield "<", False
    yield from (("/", False), dsml, ("invoke>\n</", False), dsml, ("tool_calls>", False))


def _joined(parts: Iterable[Segment]) -> list[Segment]:
    """Text that is not parted by a special token is one segment."""
    joined: list[Segment] = []
    for text, control in parts:
        if not control and joined and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        elif text:
            joined.append((text, control))
    return joined


@cache
def frame(system: bool) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """What the layout puts before and behind the schemas of tools, with and without a system prompt."""
    tokenizer = byte_tokenizer()
    declared = tool("x", "x", "x")
    schema = json.dumps(declared["function"])
    messages = [{"role": "system", "content": "s"}] * system + [{"role": "user", "content": ""}]
    tokens = render(tokenizer, messages, thinking=False, tools=[declared]).tokens
    specials = {tokenizer.encode(token)[0] for token in (*LEADING, *TRAILING)}
    body = tokens[1 + system : tokens.index(tokenizer.encode(USER)[0])]
    parts = _joined((tokenizer.decode([id]), id in specials) for id in body)
    at = next(i for i, (text, _) in enumerate(parts) if schema in text)
    before, _, behind = parts[at][0].partition(schema)
    return (*parts[:at], (before, False)), ((behind, False), *parts[at + 1 :])
