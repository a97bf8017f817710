"""The gateway through Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from support.gateway import MODEL, Gateway

QUESTION: Any = [{"role": "user", "content": "What is 2 + 3?"}]
ROOM: Any = [{"role": "user", "content": "What is the room of Tolkar?"}]
TOOLS: Any = [
    {
        "name": "get_room",
        "description": "Get the room of a person.",
        "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    }
]
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as made:
        yield made


def create(client: anthropic.Anthropic, messages: Any = QUESTION, **options: Any) -> anthropic.types.Message:
    temperature = options.pop("temperature", 0.0)  # which the client has no name for any more
    more = {"max_tokens": 300, **options, "extra_body": {"temperature": temperature}}
    message: anthropic.types.Message = client.messages.create(model=MODEL, messages=messages, **more)
    return message


def test_message(client: anthropic.Anthropic) -> None:
    message = create(client)
    assert [block.type for block in message.content] == ["text"] and message.content[0].text == "5"  # type: ignore[union-attr]
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    again = create(client)
    assert again.usage.cache_read_input_tokens and again.usage.input_tokens <= 1
    count = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    assert count.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("asked", ["question", "tools"])
def test_a_stream_joins_to_the_message(client: anthropic.Anthropic, asked: str, thinking: bool) -> None:
    options: dict[str, Any] = {"thinking": THINKING} if thinking else {}
    messages = QUESTION
    if asked == "tools":
        messages, options["tools"] = ROOM, TOOLS
    whole = create(client, messages, **options)
    with client.messages.stream(
        model=MODEL, messages=messages, max_tokens=300, extra_body={"temperature": 0.0}, **options
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()

    def plain(message: Any) -> list[dict[str, Any]]:
        blocks = [block.model_dump(exclude={"id", "signature", "caller"}) for block in message.content]
        return [{key: value for key, value in block.items() if value is not None} for block in blocks]

    assert plain(final) == plain(whole) and final.stop_reason == whole.stop_reason
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert any(block.type == "thinking" for block in final.content) == thinking
    if asked == "tools":
        assert whole.stop_reason == "tool_use"
        assert next(b for b in final.content if b.type == "tool_use").input == {"name": "Tolkar"}


@pytest.mark.parametrize("thinking", [False, True])
def test_tool_choices(client: anthropic.Anthropic, thinking: bool) -> None:
    options: dict[str, Any] = {"thinking": THINKING} if thinking else {}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_room", "disable_parallel_tool_use": True}):
        message = create(client, tools=TOOLS, tool_choice=choice, **options)
        assert message.stop_reason == "tool_use" and message.content[-1].type == "tool_use"
    none = create(client, ROOM, tools=TOOLS, tool_choice={"type": "none"}, **options)
    assert none.stop_reason != "tool_use"


def test_a_result_is_read(client: anthropic.Anthropic) -> None:
    first = create(client, ROOM, tools=TOOLS)
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "423"}]}
    more = [*ROOM, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = create(client, more, tools=TOOLS)
    assert second.content[0].text == "423"  # type: ignore[union-attr]


def test_how_a_message_ends(client: anthropic.Anthropic) -> None:
    asked: Any = [{"role": "user", "content": "Copy: red blue green"}]
    whole = create(client, asked).content[0].text  # type: ignore[union-attr]
    word = whole.split()[-1]
    stopped = create(client, asked, stop_sequences=[word])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word
    assert create(client, asked, max_tokens=1).stop_reason == "max_tokens"


def test_a_call_that_is_cut_off_is_not_told_as_finished(client: anthropic.Anthropic) -> None:
    whole = create(client, ROOM, tools=TOOLS)
    cut = create(client, ROOM, tools=TOOLS, max_tokens=whole.usage.output_tokens - 6)
    assert cut.stop_reason == "max_tokens" and not [b for b in cut.content if b.type == "tool_use"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 9.0},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tool_choice": {"type": "tool"}},
        {"messages": []},
    ],
)
def test_what_is_wrong_is_refused(client: anthropic.Anthropic, options: dict[str, Any]) -> None:
    with pytest.raises(anthropic.BadRequestError) as error:
        create(client, **{"messages": QUESTION, **options})
    body: Any = error.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert error.value.request_id and body["request_id"] == error.value.request_id


def test_no_such_model(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-none", messages=QUESTION, max_tokens=3)
