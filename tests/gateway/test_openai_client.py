"""The gateway through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from support.gateway import MODEL, Gateway

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
ROOMS = [
    {"role": "system", "content": "You have tools."},
    {"role": "user", "content": "What is the room of Tolkar?"},
]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_room",
            "description": "Get the room of a person.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_city",
            "description": "Get the city of a person.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    },
]
THINKING = {"thinking": {"type": "enabled"}}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, messages: Any = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0, **options})


def test_chat(client: openai.OpenAI) -> None:
    reply = chat(client)
    assert reply.choices[0].message.content == "5" and reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    again = chat(client).usage
    assert again.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 1
    assert again.receipts[0]["cached"] == again.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_joins_to_the_reply(client: openai.OpenAI, thinking: bool) -> None:
    options: dict[str, Any] = {"extra_body": THINKING} if thinking else {}
    whole = chat(client, **options)
    message = whole.choices[0].message
    content, reasoning, finish, usage, roles = "", "", [], None, 0
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **options):
        if not chunk.choices:
            usage = chunk.usage
            continue
        delta = chunk.choices[0].delta
        roles += delta.role is not None
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        finish += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert (content, reasoning or None) == (message.content, message.reasoning_content)
    assert bool(reasoning) == thinking and roles == 1 and finish == ["stop"]
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens
    assert bool(usage.completion_tokens_details.reasoning_tokens) == thinking


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", "named", "none"])
def test_tools(client: openai.OpenAI, choice: Any, thinking: bool) -> None:
    named = {"type": "function", "function": {"name": "get_city"}}
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": named if choice == "named" else choice}
    if thinking:
        options["extra_body"] = THINKING
    message = chat(client, ROOMS, max_tokens=300, **options).choices[0].message
    if choice == "none":
        assert not message.tool_calls and "DSML" not in message.content
        return
    call = message.tool_calls[0]
    assert call.function.name == ("get_city" if choice == "named" else "get_room")
    assert json.loads(call.function.arguments)["name"]
    parts: dict[int, dict[str, str]] = {}
    for chunk in chat(client, ROOMS, max_tokens=300, stream=True, **options):
        for own in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            part = parts.setdefault(own.index, {"name": "", "arguments": "", "id": own.id or ""})
            part["name"] += own.function.name or ""
            part["arguments"] += own.function.arguments or ""
    streamed = [(part["name"], json.loads(part["arguments"])) for part in parts.values()]
    assert streamed == [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls]


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    reply = chat(client, ROOMS, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    assert len(reply.choices[0].message.tool_calls) == 1


def test_a_call_that_is_cut_off_is_not_told_as_finished(client: openai.OpenAI) -> None:
    whole = chat(client, ROOMS, tools=TOOLS, tool_choice="required")
    cut = whole.usage.completion_tokens - 6
    reply = chat(client, ROOMS, tools=TOOLS, tool_choice="required", max_tokens=cut).choices[0]
    assert reply.finish_reason == "length" and not reply.message.tool_calls
    last = [c for c in chat(client, ROOMS, tools=TOOLS, tool_choice="required", max_tokens=cut, stream=True)][-1]
    assert last.choices[0].finish_reason == "length"


def ending(client: openai.OpenAI) -> dict[str, Any]:
    """A bias towards the end of a document: the small model would not come to it by itself."""
    asked = {"prompt": '"}', "add_special_tokens": False}
    return {str(token): 20 for token in client.post("/../tokenize", body=asked, cast_to=dict[str, Any])["tokens"]}


def finished(client: openai.OpenAI, **options: Any) -> list[str]:
    """What some seeds say that come to an end."""
    replies = [chat(client, seed=seed, **options).choices[0] for seed in range(4)]
    found = [reply.message.content for reply in replies if reply.finish_reason == "stop"]
    assert found
    return found


def test_json_formats(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": "Reply in json: name and seat of Rorna, seat 556."}]
    form: Any = {"type": "json_object"}
    free = {"max_tokens": 300, "temperature": 1.5, "logit_bias": ending(client)}
    for text in finished(client, messages=asked, response_format=form, **free):
        assert isinstance(json.loads(text), dict)
    schema = {
        "type": "object",
        "properties": {"seat": {"type": "integer"}},
        "required": ["seat"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "seat", "schema": schema, "strict": True}}
    for options in ({}, {"extra_body": THINKING}):
        for text in finished(client, messages=asked, response_format=form, max_tokens=300, **options):
            assert set(json.loads(text)) == {"seat"}


class Seat(BaseModel):
    seat: int
    city: str


def test_parse(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "Seat 556, city Besnim."}]
    reply = client.chat.completions.parse(
        model=MODEL, messages=asked, response_format=Seat, max_tokens=64, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Seat)


def test_a_format_beside_tools(client: openai.OpenAI) -> None:
    """Either calls, or an answer of that form."""
    schema = {
        "type": "object",
        "properties": {"room": {"type": "string"}},
        "required": ["room"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "room", "schema": schema, "strict": True}}
    seen = set()
    for seed in range(12):
        reply = chat(client, ROOMS, tools=TOOLS, response_format=form, temperature=1.5, seed=seed, max_tokens=400)
        message = reply.choices[0].message
        if reply.choices[0].finish_reason == "length":
            continue
        seen.add(bool(message.tool_calls))
        if not message.tool_calls:
            assert set(json.loads(message.content)) == {"room"}
    assert True in seen


def test_n_seed_stop_and_logprobs(client: openai.OpenAI) -> None:
    reply = chat(client, n=3, seed=7, temperature=2.0, max_tokens=12, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    again = chat(client, n=3, seed=7, temperature=2.0, max_tokens=12)
    assert [c.message.content for c in reply.choices] == [c.message.content for c in again.choices]
    for choice in reply.choices:
        said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert choice.message.content and said.decode(errors="replace") == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
        assert all(bytes(entry.bytes).decode(errors="replace") == entry.token for entry in choice.logprobs.content)
    texts: dict[int, str] = {}
    for chunk in chat(client, n=3, seed=7, temperature=2.0, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + (
            chunk.choices[0].delta.content or ""
        )
    assert [texts[i] for i in range(3)] == [c.message.content for c in reply.choices]
    asked = [{"role": "user", "content": "Copy: red blue green"}]
    whole = chat(client, asked, max_tokens=20).choices[0].message.content
    stop = whole.split()[-1]
    assert chat(client, asked, max_tokens=20, stop=[stop]).choices[0].message.content == whole[: whole.index(stop)]


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="The room of", max_tokens=5, temperature=0, logprobs=2)
    assert len(reply.choices[0].logprobs.tokens) == 5  # type: ignore[union-attr,arg-type]
    many = client.completions.create(model=MODEL, prompt=["A", "B"], n=2, max_tokens=3, seed=1)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    echo = client.completions.create(model=MODEL, prompt="The room of", max_tokens=0, echo=True, logprobs=0)
    entries = echo.choices[0].logprobs
    assert echo.choices[0].text == "The room of" and entries is not None and entries.tokens is not None
    assert "".join(entries.tokens) == "The room of"
    assert entries.text_offset == [len("".join(entries.tokens[:i])) for i in range(len(entries.tokens))]
    pieces = client.completions.create(model=MODEL, prompt="The room of", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == reply.choices[0].text
    ids = client.post("/../tokenize", body={"prompt": "The room of"}, cast_to=dict[str, Any])["tokens"]
    same = client.completions.create(model=MODEL, prompt=ids, max_tokens=5, temperature=0)
    assert same.choices[0].text == reply.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)  # type: ignore[arg-type]
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("temperature", {"temperature": -1}),
        ("max_tokens", {"max_tokens": 1 << 30}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tool_choice", {"tool_choice": "required"}),
        ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("modalities", {"modalities": ["audio"]}),
        ("n", {"n": 100}),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **{"messages": QUESTION, **options})
    assert error.value.param == field, error.value
    assert error.value.type == "invalid_request_error"
