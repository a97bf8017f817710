"""OpenAI's Responses: created, streamed, kept, gone on from, cancelled and deleted."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing

from aiohttp import web

from weft.gateway.apis.common import check_model, now
from weft.gateway.apis.responses_build import Builder
from weft.gateway.apis.responses_request import items_of, turn_request
from weft.gateway.apis.responses_store import Kept, Responses
from weft.gateway.apis.responses_types import (
    Deleted,
    ItemList,
    Reasoning,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseRequest,
    TextFormat,
    TextOptions,
)
from weft.gateway.chat.base import Ended, Prepared
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.errors import HttpError, fault
from weft.gateway.http.sse import EventStream
from weft.runtime.errors import RequestError


async def create(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: ResponseRequest = exchange.body
    model, store = check_model(exchange, asked.model), exchange.state.part(Responses)
    before, conversation = [], ""
    if asked.previous_response_id is not None:
        previous = store.find(exchange.caller, asked.previous_response_id)
        before, conversation = previous.history(), previous.conversation
    if asked.background and asked.store is False:
        raise RequestError("background", True, "needs store: a response is retrieved")
    id = f"resp_{secrets.token_hex(16)}"
    turn = await exchange.state.turns.prepare(turn_request(exchange, asked, before, conversation or id))
    items = [*before, *items_of(asked)]
    kept = Kept(_response(asked, id, model), items, exchange.caller.key, conversation or id)
    if asked.store is not False:
        store.put(id, kept)
    if not asked.background:
        work = _make(exchange, kept, turn, asked)
        if not asked.stream:
            await work
            return Answer(kept.response)
        return await _streamed(exchange, kept, work)
    with_gate = _behind(exchange, kept, turn, asked)
    kept.task = exchange.state.go_on(with_gate)
    if asked.stream:
        return await _replay(exchange, kept, 0)
    return Answer(kept.response)


async def _behind(exchange: Exchange, kept: Kept, turn: Prepared, asked: ResponseRequest) -> None:
    """In the background: it has a place in the queue beyond its request's."""
    try:
        with exchange.state.gate.enter(exchange.caller):
            await _make(exchange, kept, turn, asked)
    except HttpError as error:
        await _failed(kept, error)


async def _make(exchange: Exchange, kept: Kept, turn: Prepared, asked: ResponseRequest) -> None:
    sign = turn.ids[0] if "reasoning.encrypted_content" in (asked.include or ()) else None
    builder = Builder(kept.response, kept.tell, sign, turn.params.logprobs)
    turns = exchange.state.turns
    try:
        async with aclosing(turns.draw(turn)) as events:
            begun = False
            async for event in events:
                if not begun:
                    begun = True
                    await builder.begin()
                await builder.add(event)
                if isinstance(event, Ended):
                    await builder.end(event, exchange.state.engine.tokenizer, now())
    except (asyncio.CancelledError, ConnectionError):
        kept.response.status = "cancelled"
        await kept.close()
        raise
    except Exception as error:
        await _failed(kept, error)
        if not asked.background and not (asked.stream and kept.told):
            raise
    await kept.close()


async def _failed(kept: Kept, error: Exception) -> None:
    told = fault(error)
    kept.response.status = "failed"
    kept.response.error = ResponseError(told.code or "server_error", told.message)
    if kept.told:
        await kept.tell(ResponseEvent(type="response.failed", response=kept.response))
    await kept.close()


async def _streamed(exchange: Exchange, kept: Kept, work: object) -> web.StreamResponse:
    """Make it while its client listens; it ends with the client."""
    stream = exchange.stream()
    kept.listener = lambda event: _send(stream, event)
    await work  # type: ignore[misc]
    return await stream.done()


async def _replay(exchange: Exchange, kept: Kept, start: int) -> web.StreamResponse:
    """Its events from a number on, those to come too. Leaving does not end it."""
    stream = exchange.stream()
    async for event in kept.follow(start):
        await _send(stream, event)
    return await stream.done()


async def _send(stream: EventStream, event: ResponseEvent) -> None:
    await stream.send(event, event=event.type)


def _response(asked: ResponseRequest, id: str, model: str) -> Response:
    return Response(
        id=id,
        created_at=now(),
        model=model,
        status="queued" if asked.background else "in_progress",
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        reasoning=asked.reasoning or Reasoning(),
        store=asked.store is not False,
        background=bool(asked.background),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        text=asked.text if asked.text and asked.text.format else TextOptions(format=TextFormat(type="text")),
        tool_choice=asked.tool_choice or "auto",
        tools=asked.tools or [],
        top_p=1.0 if asked.top_p is None else asked.top_p,
    )


async def retrieve(exchange: Exchange) -> Answer | web.StreamResponse:
    kept = exchange.state.part(Responses).find(exchange.caller, exchange.path("id"))
    start = exchange.whole_number("starting_after", 0) + ("starting_after" in exchange.request.query)
    if exchange.flag("stream"):
        return await _replay(exchange, kept, start)
    return Answer(kept.response)


async def cancel(exchange: Exchange) -> Answer:
    kept = exchange.state.part(Responses).find(exchange.caller, exchange.path("id"))
    if not kept.response.background:
        raise HttpError(400, "only a response in the background can be cancelled", code="not_background")
    await kept.cancel()
    return Answer(kept.response)


async def delete(exchange: Exchange) -> Answer:
    store = exchange.state.part(Responses)
    kept = store.find(exchange.caller, exchange.path("id"))
    await kept.cancel()
    store.forget(kept.response.id)
    return Answer(Deleted(id=kept.response.id))


async def input_items(exchange: Exchange) -> Answer:
    kept = exchange.state.part(Responses).find(exchange.caller, exchange.path("id"))
    items = kept.input_items()
    ids = [str(item["id"]) for item in items]
    return Answer(ItemList(data=items, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None))


_ID = "/v1/responses/{id}"
ROUTES = (
    Route(
        "POST",
        "/v1/responses",
        create,
        "openai",
        "A turn, kept so that it can be retrieved and gone on from.",
        body=ResponseRequest,
        reply=Response,
        events=ResponseEvent,
        size="large",
        gated=True,
    ),
    Route(
        "GET", _ID, retrieve, "openai", "A response that is kept, or its events.",
        reply=Response, events=ResponseEvent, statuses=(404,),
        query={"stream": {"type": "boolean"}, "starting_after": {"type": "integer", "minimum": 0}},
    ),
    Route("DELETE", _ID, delete, "openai", "Forget a response.", reply=Deleted, statuses=(404,)),
    Route(
        "POST", _ID + "/cancel", cancel, "openai", "End a response in the background.",
        reply=Response, statuses=(400, 404),
    ),
    Route(
        "GET", _ID + "/input_items", input_items, "openai", "What a response was asked.",
        reply=ItemList, statuses=(404,),
    ),
)  # fmt: skip
