"""An assistant turn: from a request to the tokens of its prompt, and from what is drawn to a reply."""

from __future__ import annotations

import json
import random
import secrets
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from weft.gateway.chat.base import Ended, Part, Prepared, Receipt, TurnRequest, receipt
from weft.gateway.chat.drawing import Drawn, Keeper, Lease, draw, merged
from weft.gateway.chat.encoding import aside
from weft.gateway.chat.replay import Replay, text_of
from weft.runtime.decoding.params import Grammar
from weft.runtime.decoding.tool_calls import tool_grammar
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import ContextLengthError, RequestError, UnsupportedError
from weft.runtime.text.chat import format_text, generation_of, render
from weft.runtime.text.chat_output import ReplyDelta, ReplyParser
from weft.runtime.text.tokens import THINK_END
from weft.runtime.text.turns import turn_cuts

_NOTHING = ReplyDelta()


class Turns:
    """Draws turns on one engine. told: of every one that ends."""

    def __init__(self, engine: Engine, replay: Replay, keeper: Keeper, told: Callable[[Receipt], None]) -> None:
        self.engine, self.replay = engine, replay
        self._keeper, self._told = keeper, told
        self._think_end = engine.tokenizer.encode(THINK_END)[0]

    async def prepare(self, request: TurnRequest) -> Prepared:
        """Lay it out and check it. Raises `RequestError`."""
        engine = self.engine
        if not 1 <= request.n <= engine.slots - 1:
            raise RequestError("n", request.n, f"not in 1..{engine.slots - 1}")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError("max_tokens", request.max_tokens, "must be at least 1")
        messages, drawn = self.replay.apply(request.namespace, request.messages)
        size = sum(_size(message) for message in messages)
        return await aside(size, lambda: self._lay_out(request, messages, drawn))

    def _lay_out(
        self, request: TurnRequest, messages: list[dict[str, Any]], drawn: list[array[int] | None]
    ) -> Prepared:
        engine = self.engine
        form, shown = request.response_format, messages
        if form is not None and request.tools:
            shown = _told(messages, format_text(form))
            form = None
        prompt = render(
            engine.tokenizer,
            shown,
            thinking=request.thinking,
            effort=request.effort if request.thinking else None,
            tools=request.tools,
            tool_choice=request.tool_choice,
            response_format=form,
            generation=generation_of(engine.model_config),
            drawn=drawn,
        )
        room = engine.context - len(prompt.tokens)
        if room < 1:
            raise ContextLengthError("messages", len(prompt.tokens), f"the context holds {engine.context} tokens")
        if request.max_tokens is not None and request.max_tokens > room:
            reason = f"behind {len(prompt.tokens)} tokens; the context holds {engine.context}"
            raise ContextLengthError("max_tokens", request.max_tokens, reason)
        params = msgspec.structs.replace(
            request.params,
            max_tokens=request.max_tokens or room,
            grammar=_grammar(request, prompt.form.in_tool_calls),
            seed=random.getrandbits(62) if request.params.seed is None else request.params.seed,
        ).validate()
        ids = [secrets.token_hex(16) for _ in range(request.n)]
        return Prepared(request, messages, prompt, params, ids)

    async def draw(self, turn: Prepared) -> AsyncGenerator[Part | Ended]:
        """Parts of its replies as they are drawn, then their ends. Leaving early cancels what is under way."""
        if turn.request.n == 1:
            async with aclosing(self._reply(turn, 0, None)) as events:
                async for event in events:
                    yield event
            return
        with self._open(turn) as sequence:
            children = await sequence.fork(turn.request.n)
            replies = [self._reply(turn, i, child) for i, child in enumerate(children)]
            async with aclosing(merged(replies)) as events:
                async for event in events:
                    yield event

    async def whole(self, turn: Prepared) -> list[Ended]:
        """Its replies, in order."""
        async with aclosing(self.draw(turn)) as events:
            ends = [event async for event in events if isinstance(event, Ended)]
        return sorted(ends, key=lambda end: end.index)

    def _open(self, turn: Prepared) -> Sequence:
        tokens = turn.prompt.tokens
        cuts = turn_cuts(self.engine.tokenizer, tokens)
        return self.engine.open(tokens, cuts=cuts, namespace=turn.request.namespace)

    async def _reply(self, turn: Prepared, index: int, forked: Sequence | None) -> AsyncGenerator[Part | Ended]:
        request = turn.request
        assert turn.params.seed is not None
        params = msgspec.structs.replace(turn.params, seed=turn.params.seed + index)
        lease = None
        if request.session is not None and index == 0:
            lease = Lease(self._keeper, request.namespace, request.session, request.lease)
        parser = ReplyParser(turn.prompt.form)
        found = _Found()
        opened = partial(self._open, turn)
        async with aclosing(draw(opened, params, lease, forked)) as events:
            async for event in events:
                if isinstance(event, Drawn):
                    yield self._ended(turn, index, parser, event, found)
                    return
                found.add(event)
                delta = parser.feed(event.text)
                if delta is not None or event.logprobs:
                    yield Part(index, delta or _NOTHING, event.logprobs)

    def _ended(self, turn: Prepared, index: int, parser: ReplyParser, drawn: Drawn, found: _Found) -> Ended:
        done, request, tokenizer = drawn.done, turn.request, self.engine.tokenizer
        last, reply = parser.finish("stop" if done.finish_reason == "stop" else "length")
        shown, rest = found.tokens[: done.kept], found.tokens[done.kept :]
        shown += [tokenizer.eos] if rest == [tokenizer.eos] else []
        if tokenizer.decode(found.tokens[: done.kept]) == "".join(found.text):
            opening = turn.prompt.tokens[len(turn.prompt.tokens) - turn.prompt.opening :]
            tokens = [*opening, *shown]
            self.replay.put(request.namespace, turn.ids[index], turn.messages, reply, tokens)
        reasoning = 0
        if turn.prompt.form.thinking and turn.prompt.form.resumes != "content":
            reasoning = shown.index(self._think_end) + 1 if self._think_end in shown else len(shown)
        took = receipt(done.usage, drawn.before)
        self._told(took)
        return Ended(
            index=index,
            delta=last or _NOTHING,
            reply=reply,
            stop=done.stop,
            receipt=took,
            tokens=shown,
            reasoning=reasoning,
            id=turn.ids[index],
            logprobs=found.logprobs[: done.kept],
        )


@dataclass
class _Found:
    """What was drawn so far."""

    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[m.Logprob] = field(default_factory=list)

    def add(self, delta: m.Delta) -> None:
        self.tokens += delta.tokens
        self.text.append(delta.text)
        self.logprobs += delta.logprobs


def _size(message: Mapping[str, Any]) -> int:
    """Characters of what it says."""
    calls = message.get("tool_calls") or ()
    texts = [text_of(message.get("content")), message.get("reasoning_content") or ""]
    return sum(map(len, texts)) + sum(len(call["function"]["arguments"]) for call in calls)


def _told(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with more for the model to know before all others."""
    first = messages[0] if messages and messages[0].get("role") == "system" else None
    if first is None:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": text_of(first["content"]) + text}, *messages[1:]]


def _grammar(request: TurnRequest, opened: bool) -> Grammar | None:
    """What holds the replies: tools, a format, or both. opened: the prompt has opened the block of calls."""
    text = _answer(request.response_format)
    if not request.tools or request.tool_choice == "none":
        if text is None:
            # No calls where none can be answered: the DSML token has no other use.
            return tool_grammar((), "none", thinking=request.thinking) if request.tools else None
        return Grammar(text[0], text[1], request.thinking)  # type: ignore[arg-type]
    if text is not None and text[0] != "json_schema":
        raise UnsupportedError("response_format.type", "regex", "cannot be combined with tools")
    schema = None if text is None or request.tool_choice != "auto" else text[1]
    return tool_grammar(
        request.tools,
        request.tool_choice,
        thinking=request.thinking,
        opened=opened,
        parallel=request.parallel,
        answer=schema,
    )


def _answer(given: Mapping[str, object] | None) -> tuple[str, str] | None:
    """The grammar of a response_format: its kind and text. Its shape is checked when it is laid out."""
    kind = (given or {}).get("type", "text")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return "json_schema", '{"type": "object"}'
    if kind == "regex":
        return "regex", str(given.get("regex"))
    own = given.get("json_schema")
    schema = own.get("schema", {}) if isinstance(own, Mapping) else {}
    return "json_schema", json.dumps(schema, ensure_ascii=False)
