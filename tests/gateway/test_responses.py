"""OpenAI's Responses through its own client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from support.engine import core_of, wait_for
from support.gateway import MODEL, Gateway

TOOLS: Any = [
    {
        "type": "function",
        "name": "get_room",
        "description": "Get the room of a person.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def create(client: openai.OpenAI, asked: Any = "What is 2 + 3?", **options: Any) -> Any:
    return client.responses.create(model=MODEL, input=asked, **{"temperature": 0, **options})


def test_response(client: openai.OpenAI) -> None:
    response = create(client)
    assert response.output_text == "5" and response.status == "completed"
    assert client.responses.retrieve(response.id).output_text == "5"
    listed = list(client.responses.input_items.list(response.id))
    assert listed[0].content[0].text == "What is 2 + 3?"  # type: ignore[union-attr]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    unkept = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


@pytest.mark.parametrize("effort", ["none", "high"])
def test_a_stream_joins_to_the_response(client: openai.OpenAI, effort: Any) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "reasoning": {"effort": effort}}
    whole = create(client, "What is the room of Tolkar?", **options)
    numbers, arguments, final = [], "", None
    for event in create(client, "What is the room of Tolkar?", stream=True, **options):
        numbers.append(event.sequence_number)
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        if event.type == "response.completed":
            final = event.response
    assert numbers == list(range(len(numbers))) and final is not None
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    call = whole.output[-1]
    assert json.loads(arguments) == json.loads(call.arguments) == {"name": "Tolkar"}
    assert (whole.output[0].type == "reasoning") == (effort == "high")
    assert bool(whole.usage.output_tokens_details.reasoning_tokens) == (effort == "high")


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="What is 2 + 3?", temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "5"


def test_going_on(client: openai.OpenAI) -> None:
    first = create(client, "What is the room of Tolkar?", tools=TOOLS)
    output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "423"}
    second = create(client, [output], tools=TOOLS, previous_response_id=first.id)
    assert second.output_text == "423" and second.previous_response_id == first.id
    before = first.usage.input_tokens + first.usage.output_tokens
    # The last token that was drawn was not run.
    assert second.usage.input_tokens_details.cached_tokens + second.usage.receipt["replayed"] >= before - 1
    with pytest.raises(openai.NotFoundError):
        create(client, previous_response_id="resp_none")


class Room(BaseModel):
    room: int


def test_parse(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model=MODEL, input="Room 423.", text_format=Room, max_output_tokens=64, temperature=0
    )
    assert isinstance(parsed.output_parsed, Room)


def test_cut_off(client: openai.OpenAI) -> None:
    whole = create(client, "What is the room of Tolkar?", tools=TOOLS)
    most = whole.usage.output_tokens - 6
    response = create(client, "What is the room of Tolkar?", tools=TOOLS, max_output_tokens=most)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["incomplete"]


def test_in_the_background(client: openai.OpenAI) -> None:
    response = create(client, background=True)
    assert response.status in ("queued", "in_progress")
    for _ in range(200):
        response = client.responses.retrieve(response.id)
        if response.status == "completed":
            break
        time.sleep(0.02)
    assert response.output_text == "5"
    events = list(client.responses.retrieve(response.id, stream=True))
    assert events[-1].type == "response.completed"
    rest = list(client.responses.retrieve(response.id, stream=True, starting_after=3))
    assert [event.sequence_number for event in rest] == [event.sequence_number for event in events[4:]]


def test_cancel(client: openai.OpenAI, gateway: Gateway) -> None:
    core = core_of(gateway.engine)
    wait_for(lambda: not core.calls)
    # So hot that it does not come to an end by itself.
    response = create(client, "Say.", background=True, temperature=2.0, top_p=1.0, extra_body={"thinking": True})
    wait_for(lambda: bool(core.calls))
    assert client.responses.cancel(response.id).status == "cancelled"
    wait_for(lambda: not core.calls)
    assert client.responses.retrieve(response.id).status == "cancelled"
    foreground = create(client)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(foreground.id)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("background", {"background": True, "store": False}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        ("conversation", {"conversation": "conv_1"}),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, field: str, options: dict[str, Any]) -> None:
    given = {"input": "x", **options}
    with pytest.raises(openai.BadRequestError) as error:
        create(client, given.pop("input"), **given)
    assert error.value.param == field, error.value
