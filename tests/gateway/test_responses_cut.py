"""What a response says of calls when it ends in the middle, and when it fails."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from support.engine import byte_tokenizer
from support.gateway import MODEL, Gateway, events_of
from weft.gateway.apis.responses_build import Builder
from weft.gateway.apis.responses_types import OutputCall, Response, ResponseEvent
from weft.gateway.chat.base import Ended, Part, Receipt
from weft.gateway.chat.turn import Turns
from weft.runtime.errors import EngineDead
from weft.runtime.text.chat_output import CallDelta, Reply, ReplyDelta, ToolCall


def told(reply: Reply, *deltas: ReplyDelta) -> tuple[Response, list[ResponseEvent]]:
    response = Response(id="r", created_at=0, model="m", status="in_progress")
    events: list[ResponseEvent] = []

    async def tell(event: ResponseEvent) -> None:
        events.append(event)

    async def build() -> None:
        builder = Builder(response, tell, None, None)
        await builder.begin()
        for delta in deltas:
            await builder.add(Part(0, delta))
        ended = Ended(0, ReplyDelta(), reply, None, Receipt(), [], 0, "id")
        await builder.add(ended)
        await builder.end(ended, byte_tokenizer(), 0)

    asyncio.run(build())
    return response, events


def call(index: int, arguments: str) -> ReplyDelta:
    return ReplyDelta(tool_calls=(CallDelta(index, arguments, f"call_{index}", "f"),))


@pytest.mark.parametrize("second", [False, True])
def test_calls_are_whole_or_not_by_themselves(second: bool) -> None:
    """The first one is, whether the reply was cut behind it or in another."""
    calls = [ToolCall("call_0", "f", '{"a": 1}', True)]
    deltas = [call(0, '{"a": 1}')]
    if second:
        calls.append(ToolCall("call_1", "f", '{"a', False))
        deltas.append(call(1, '{"a'))
    response, events = told(Reply(None, "", calls, "length"), *deltas)
    assert response.status == "incomplete"
    items = [item for item in response.output if isinstance(item, OutputCall)]
    assert [item.status for item in items] == ["completed", "incomplete"][: len(items)] and len(items) == len(
        calls
    )
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == ['{"a": 1}']
    ends = [event.item for event in events if event.type == "response.output_item.done"]
    assert ends == items


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_fails(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """In its own words where its stream has begun, by the status before."""

    async def draw(*_: object) -> Any:
        yield Part(0, ReplyDelta(content="Hel"))
        raise EngineDead("no core")

    monkeypatch.setattr(Turns, "draw", draw)
    asked = {"model": MODEL, "input": "x", "stream": stream}
    with gateway.http() as client, client.stream("POST", "/v1/responses", json=asked) as answer:
        if not stream:
            assert answer.status_code == 503 and "retry-after" in answer.headers
            return
        events = events_of(answer)
    assert answer.status_code == 200 and events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "engine_dead"
    kept = httpx2.get(f"{gateway.url}/v1/responses/{events[-1]['response']['id']}").json()
    assert kept["status"] == "failed"
