"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from weft.gateway.apis.chat_messages import turn_request
from weft.gateway.apis.common import check_model, extension, logprob_entries, now, usage_of
from weft.gateway.apis.openai_types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    ReplyMessage,
    ToolCall,
    ToolCallDelta,
)
from weft.gateway.chat.base import Ended, Part, Prepared
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.sse import DONE
from weft.runtime.text.chat_output import ReplyDelta


async def chat(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: ChatRequest = exchange.body
    model = check_model(exchange, asked.model)
    turn = await exchange.state.turns.prepare(turn_request(exchange, asked))
    id, created = f"chatcmpl-{secrets.token_hex(12)}", now()
    if asked.stream:
        return await _stream(exchange, asked, turn, ChatChunk(id=id, created=created, model=model, choices=[]))
    ends = await exchange.state.turns.whole(turn)
    choices = [_choice(exchange, asked, end) for end in ends]
    told = usage_of(ends)
    made = ChatCompletion(
        id=id,
        created=created,
        model=model,
        choices=choices,
        usage=told,
        sglext=extension(asked, told.prompt_tokens_details.cached_tokens),
    )
    return Answer(made)


def _choice(exchange: Exchange, asked: ChatRequest, end: Ended) -> ChatChoice:
    reply = end.reply
    # Calls that were cut off are not told of: nobody could run them.
    calls = [ToolCall(c.id, FunctionCall(c.name, c.arguments)) for c in reply.tool_calls if c.complete]
    content = reply.content + (reply.unparsed if reply.finish_reason == "stop" else "")
    message = ReplyMessage(content=content or (None if calls else ""), reasoning_content=reply.reasoning or None)
    if calls:
        message.tool_calls = calls
    logprobs = None
    if asked.logprobs:
        tokenizer = exchange.state.engine.tokenizer
        logprobs = ChatLogprobs(logprob_entries(tokenizer, end.logprobs, asked.top_logprobs or 0))
    return ChatChoice(end.index, message, reply.finish_reason, logprobs)


async def _stream(exchange: Exchange, asked: ChatRequest, turn: Prepared, head: ChatChunk) -> web.StreamResponse:
    stream = exchange.stream()
    begun: set[int] = set()
    ends: list[Ended] = []

    async def send(choice: ChunkChoice, **more: Any) -> None:
        await stream.send(msgspec.structs.replace(head, choices=[choice], **more))

    async with aclosing(exchange.state.turns.draw(turn)) as events:
        async for event in events:
            if event.index not in begun:
                begun.add(event.index)
                await send(ChunkChoice(event.index, Delta(role="assistant", content="")))
            await send(_chunk(exchange, event, turn.params.logprobs)) if _says(event) else None
            if isinstance(event, Ended):
                ends.append(event)
                rest = event.reply.unparsed if event.reply.finish_reason == "stop" else ""
                last = ChunkChoice(event.index, Delta(content=rest or None), event.reply.finish_reason)
                await send(last, sglext=extension(asked, event.receipt.cached))
    if asked.stream_options is not None and asked.stream_options.include_usage:
        await stream.send(msgspec.structs.replace(head, usage=usage_of(ends)))
    return await stream.done(DONE)


def _says(event: Part | Ended) -> bool:
    delta = event.delta
    told = delta.reasoning or delta.content or delta.tool_calls
    return bool(told) or (isinstance(event, Part) and bool(event.logprobs))


def _chunk(exchange: Exchange, event: Part | Ended, top: int | None) -> ChunkChoice:
    logprobs = None
    if isinstance(event, Part) and event.logprobs:
        tokenizer = exchange.state.engine.tokenizer
        logprobs = ChatLogprobs(logprob_entries(tokenizer, event.logprobs, top or 0))
    return ChunkChoice(event.index, delta_of(event.delta), None, logprobs)


def delta_of(delta: ReplyDelta) -> Delta:
    calls = [
        ToolCallDelta(
            call.index,
            FunctionDelta(call.name, call.arguments),
            call.id,
            "function" if call.id is not None else None,
        )
        for call in delta.tool_calls
    ]
    return Delta(None, delta.content or None, delta.reasoning or None, calls or None)


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat,
        "openai",
        "An assistant turn, with tools, formats and reasoning.",
        body=ChatRequest,
        reply=ChatCompletion,
        events=ChatChunk,
        size="large",
        gated=True,
        weigh=lambda asked: asked.n or 1,
    ),
)
