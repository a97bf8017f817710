"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's."""

from __future__ import annotations

import json
import secrets
from contextlib import aclosing

from aiohttp import web

from weft.gateway.apis.anthropic_request import turn_request
from weft.gateway.apis.anthropic_types import (
    AnthropicUsage,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountRequest,
    Event,
    InputDelta,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    OutputBlock,
    SignatureDelta,
    Stopped,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    TokenCount,
    ToolUseBlock,
)
from weft.gateway.apis.common import check_model
from weft.gateway.chat.base import Ended, Part, Prepared
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.sse import EventStream

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


async def messages(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: MessagesRequest = exchange.body
    model = check_model(exchange, asked.model)
    turn = await exchange.state.turns.prepare(turn_request(exchange, asked))
    id = f"msg_{secrets.token_hex(12)}"
    if asked.stream:
        return await _stream(exchange, turn, id, model)
    (end,) = await exchange.state.turns.whole(turn)
    return Answer(_message(id, model, end))


async def count(exchange: Exchange) -> Answer:
    asked: CountRequest = exchange.body
    check_model(exchange, asked.model)
    turn = await exchange.state.turns.prepare(turn_request(exchange, asked))
    return Answer(TokenCount(len(turn.prompt.tokens)))


def _message(id: str, model: str, end: Ended) -> Message:
    reply = end.reply
    content: list[OutputBlock] = []
    if reply.reasoning:
        content.append(ThinkingBlock(reply.reasoning, end.id))
    text = reply.content + (reply.unparsed if reply.finish_reason == "stop" else "")
    if text:
        content.append(TextBlock(text))
    # Calls that were cut off are not told of: nobody could run them.
    content += [ToolUseBlock(c.id, c.name, json.loads(c.arguments)) for c in reply.tool_calls if c.complete]
    reason, sequence = _stop(end)
    return Message(
        id=id, model=model, content=content, stop_reason=reason, stop_sequence=sequence, usage=_usage(end)
    )


def _stop(end: Ended) -> tuple[StopReason, str | None]:
    match end.reply.finish_reason:
        case "tool_calls":
            return "tool_use", None
        case "length":
            return "max_tokens", None
    if isinstance(end.stop, str):
        return "stop_sequence", end.stop
    return "end_turn", None


def _usage(end: Ended) -> AnthropicUsage:
    took = end.receipt
    return AnthropicUsage(
        input_tokens=took.prompt - took.cached,
        output_tokens=took.generated,
        cache_read_input_tokens=took.cached,
        receipt=took,
    )


async def _stream(exchange: Exchange, turn: Prepared, id: str, model: str) -> web.StreamResponse:
    stream = exchange.stream(_PING)
    blocks = _Blocks(stream, turn.ids[0])
    begun = AnthropicUsage(input_tokens=len(turn.prompt.tokens), output_tokens=0)
    head = Message(id=id, model=model, content=[], stop_reason=None, stop_sequence=None, usage=begun)
    async with aclosing(exchange.state.turns.draw(turn)) as events:
        started = False
        async for event in events:
            if not started:
                started = True
                await blocks.send(MessageStart(head))
            await blocks.add(event)
            if isinstance(event, Ended):
                await blocks.end(event)
                reason, sequence = _stop(event)
                await blocks.send(MessageDelta(Stopped(reason, sequence), _usage(event)))
                await blocks.send(MessageStop())
    return await stream.done()


class _Blocks:
    """A reply as blocks that follow one another, each begun, added to and ended."""

    def __init__(self, stream: EventStream, signature: str) -> None:
        self._stream, self._signature = stream, signature
        self._index = -1
        self._kind: tuple[str, int] | None = None  # of the open block, and which call it is
        self._call = 0

    async def send(self, event: Event) -> None:
        kind = type(event).__struct_config__.tag
        await self._stream.send(event, event=str(kind))

    async def add(self, event: Part | Ended) -> None:
        delta = event.delta
        if delta.reasoning:
            await self._open(("thinking", 0), ThinkingBlock("", ""))
            await self.send(BlockDelta(self._index, ThinkingDelta(delta.reasoning)))
        if delta.content:
            await self._text(delta.content)
        for call in delta.tool_calls:
            if call.id is not None:
                await self._open(("tool_use", call.index), ToolUseBlock(call.id, call.name or "", {}))
            if call.arguments:
                await self.send(BlockDelta(self._index, InputDelta(call.arguments)))

    async def end(self, event: Ended) -> None:
        if event.reply.unparsed and event.reply.finish_reason == "stop":
            await self._text(event.reply.unparsed)
        await self._close()

    async def _text(self, text: str) -> None:
        await self._open(("text", 0), TextBlock(""))
        await self.send(BlockDelta(self._index, TextDelta(text)))

    async def _open(self, kind: tuple[str, int], block: OutputBlock) -> None:
        if self._kind == kind:
            return
        await self._close()
        self._kind = kind
        self._index += 1
        await self.send(BlockStart(self._index, block))

    async def _close(self) -> None:
        if self._kind is not None:
            if self._kind[0] == "thinking":
                await self.send(BlockDelta(self._index, SignatureDelta(self._signature)))
            await self.send(BlockStop(self._index))
            self._kind = None


ROUTES = (
    Route(
        "POST",
        "/v1/messages",
        messages,
        "anthropic",
        "An assistant turn, with thinking and tools.",
        body=MessagesRequest,
        reply=Message,
        events=Event,
        size="large",
        gated=True,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        count,
        "anthropic",
        "How many tokens a request's prompt has.",
        body=CountRequest,
        reply=TokenCount,
        size="large",
        statuses=(404,),
    ),
)
