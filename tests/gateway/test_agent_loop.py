"""Agents of twenty turns with tools: what was said is never computed again, whatever their client does to it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from support.gateway import MODEL, Gateway

TURNS = 20
ROOMS = {name: str(100 + 7 * i) for i, name in enumerate(("Tolkar", "Malles", "Vommas", "Rorna", "Besnim"))}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "floor": {"type": "integer"}},
    "required": ["name", "floor"],
}


def questions() -> list[str]:
    names = [*ROOMS] * (TURNS // len(ROOMS))
    return [f"What is the room of {name}?" for name in names]


class Ledger:
    """Holds every turn to what was known: all tokens of the turn before, but for the last one that was drawn."""

    def __init__(self) -> None:
        self.known = 0
        self.turns = 0
        self.calls = 0

    def took(self, receipt: dict[str, Any]) -> None:
        again = receipt["cached"] + receipt["replayed"]
        assert again >= self.known - 1, (self.turns, self.known, receipt)
        self.known = receipt["prompt"] + receipt["generated"]
        self.turns += 1

    def check(self) -> None:
        assert self.turns >= TURNS and self.calls >= TURNS // 2, (self.turns, self.calls)


def scrambled(arguments: str) -> str:
    """The same arguments, as a client may write them that read and wrote them again."""
    pairs = list(json.loads(arguments).items())
    random.shuffle(pairs)
    return json.dumps(dict(pairs), indent=random.choice([None, 1, 4]))


def openai_turn(
    client: openai.OpenAI, options: dict[str, Any], ledger: Ledger, keep: bool
) -> Callable[[Any], Any]:
    tools: Any = [{"type": "function", "function": {"name": "get_room", "parameters": SCHEMA}}]

    def turn(messages: list[Any]) -> Any:
        reply: Any = client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, temperature=0.7, seed=len(messages), **options
        )
        ledger.took(reply.usage.receipts[0])
        message = reply.choices[0].message
        said: dict[str, Any] = {"role": "assistant", "content": message.content and f"{message.content} "}
        if keep and message.reasoning_content:
            said["reasoning_content"] = message.reasoning_content
        calls = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.function.name, "arguments": scrambled(c.function.arguments)},
            }
            for c in message.tool_calls or ()
        ]
        messages.append({**said, "tool_calls": calls} if calls else said)
        ledger.calls += len(calls)
        for call in calls:
            name = json.loads(call["function"]["arguments"])["name"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": ROOMS.get(name, "unknown")})
        return bool(calls)

    return turn


@pytest.mark.parametrize("keep", [True, False], ids=["reasoning kept", "reasoning dropped"])
@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
def test_openai(gateway: Gateway, thinking: bool, keep: bool) -> None:
    options: dict[str, Any] = {"max_tokens": 200}
    options["extra_body"] = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        ledger = Ledger()
        turn = openai_turn(client, options, ledger, keep)
        messages: list[Any] = [{"role": "system", "content": f"You have tools. {thinking} {keep}"}]
        for question in questions():
            messages.append({"role": "user", "content": question})
            for _ in range(3):
                if not turn(messages):
                    break
        ledger.check()


@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
def test_anthropic(gateway: Gateway, thinking: bool) -> None:
    options: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinking else {}
    tools: Any = [{"name": "get_room", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        ledger = Ledger()
        messages: list[Any] = []
        for question in questions():
            asked: list[Any] = [{"type": "text", "text": question}]
            for _ in range(3):
                messages.append({"role": "user", "content": asked})
                reply: Any = client.messages.create(
                    model=MODEL,
                    system=f"You are an agent. {thinking}",
                    messages=messages,
                    tools=tools,
                    max_tokens=200,
                    extra_body={"temperature": 0.7, "seed": len(messages)},
                    **options,
                )
                ledger.took(reply.usage.receipt)
                messages.append({"role": "assistant", "content": [scrambled_block(b) for b in reply.content]})
                calls = [block for block in reply.content if block.type == "tool_use"]
                ledger.calls += len(calls)
                if not calls:
                    break
                asked = [
                    {"type": "tool_result", "tool_use_id": c.id, "content": ROOMS.get(c.input["name"], "unknown")}
                    for c in calls
                ]
        ledger.check()


def scrambled_block(block: Any) -> dict[str, Any]:
    plain: dict[str, Any] = block.model_dump(exclude_none=True)
    if plain["type"] == "tool_use":
        plain["input"] = json.loads(scrambled(json.dumps(plain["input"])))
    return plain


def test_a_client_may_change_what_was_said(gateway: Gateway) -> None:
    """Then the history is as the client has it, not as it was drawn."""
    tools: Any = [{"type": "function", "function": {"name": "get_room", "parameters": SCHEMA}}]
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = [{"role": "user", "content": "What is the room of Tolkar?"}]
        first: Any = client.chat.completions.create(
            model=MODEL, messages=asked, tools=tools, tool_choice="required", temperature=0, max_tokens=200
        )
        call = first.choices[0].message.tool_calls[0]
        other = {"name": "Malles", "floor": 3}
        prompts = set()
        for arguments in (json.loads(call.function.arguments), other):
            function = {"name": "get_room", "arguments": json.dumps(arguments)}
            said = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
            told = {"role": "tool", "tool_call_id": call.id, "content": "1"}
            turn = gateway.state.replay.apply("", [*asked, said, told])
            prompts.add(turn[1][0] is None)
        assert prompts == {False, True}
