"""Several calls in one turn, through each API: streamed as told, answered, and replayed as drawn."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from support.gateway import MODEL, Gateway

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
SEEDS = range(3)  # of which one at least calls more than once
Calls = list[tuple[str, str, Any]]  # id, name, arguments


class Chat:
    """The same three things of each API: a turn with its calls, the turn as a stream, and the turn behind it."""

    def __init__(self, gateway: Gateway) -> None:
        self.client: Any = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)

    def ask(self, seed: int, thinking: bool, parallel: bool = True, more: Any = (), **options: Any) -> Any:
        tools: Any = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in ("a", "b")]
        return self.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}, *more],
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=parallel,
            seed=seed,
            max_tokens=2000,
            extra_body={"thinking": {"type": "enabled" if thinking else "disabled"}},
            **options,
        )

    def calls(self, reply: Any) -> Calls:
        made = reply.choices[0].message.tool_calls
        return [(own.id, own.function.name, json.loads(own.function.arguments)) for own in made]

    def streamed(self, seed: int, thinking: bool) -> Calls:
        parts: dict[int, list[str]] = {}
        for chunk in self.ask(seed, thinking, stream=True):
            for own in chunk.choices[0].delta.tool_calls or ():
                part = parts.setdefault(own.index, [own.id or "", own.function.name or "", ""])
                part[2] += own.function.arguments or ""
        return [(id, name, json.loads(arguments)) for _, (id, name, arguments) in sorted(parts.items())]

    def behind(self, seed: int, thinking: bool, reply: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The receipts of both turns. Reasoning is not sent back."""
        message = reply.choices[0].message
        calls = [
            {
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, indent=1)},
            }
            for id, name, arguments in self.calls(reply)
        ]
        results = [{"role": "tool", "tool_call_id": id, "content": "1"} for id, *_ in self.calls(reply)]
        said = {"role": "assistant", "content": message.content, "tool_calls": calls}
        again = self.ask(seed, thinking, more=[said, *results])
        return reply.usage.receipts[0], again.usage.receipts[0]


class Responses(Chat):
    def ask(self, seed: int, thinking: bool, parallel: bool = True, more: Any = (), **options: Any) -> Any:
        return self.client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": "x"}, *more],
            tools=[{"type": "function", "name": n, "parameters": SCHEMA, "strict": True} for n in ("a", "b")],
            tool_choice="required",
            parallel_tool_calls=parallel,
            max_output_tokens=2000,
            extra_body={"thinking": thinking, "seed": seed},
            **options,
        )

    def calls(self, reply: Any) -> Calls:
        made = [own for own in reply.output if own.type == "function_call"]
        return [(own.call_id, own.name, json.loads(own.arguments)) for own in made]

    def streamed(self, seed: int, thinking: bool) -> Calls:
        done = [
            event.item
            for event in self.ask(seed, thinking, stream=True)
            if event.type == "response.output_item.done" and event.item.type == "function_call"
        ]
        return [(own.call_id, own.name, json.loads(own.arguments)) for own in done]

    def behind(self, seed: int, thinking: bool, reply: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        results = [{"type": "function_call_output", "call_id": id, "output": "1"} for id, *_ in self.calls(reply)]
        calls = [own.model_dump() for own in reply.output if own.type == "function_call"]
        again = self.ask(seed, thinking, more=[*calls, *results])
        return reply.usage.receipt, again.usage.receipt


class Messages(Chat):
    def __init__(self, gateway: Gateway) -> None:
        self.client = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)

    def options(self, seed: int, thinking: bool, parallel: bool = True, more: Any = ()) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x"}, *more],
            "tools": [{"name": n, "input_schema": SCHEMA} for n in ("a", "b")],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": not parallel},
            "max_tokens": 2000,
            "extra_body": {"seed": seed},
            "thinking": {"type": "enabled", "budget_tokens": 1024} if thinking else {"type": "disabled"},
        }

    def ask(self, *given: Any, **options: Any) -> Any:
        return self.client.messages.create(**self.options(*given, **options))

    def calls(self, reply: Any) -> Calls:
        return [(own.id, own.name, own.input) for own in reply.content if own.type == "tool_use"]

    def streamed(self, seed: int, thinking: bool) -> Calls:
        with self.client.messages.stream(**self.options(seed, thinking)) as stream:
            return self.calls(stream.get_final_message())

    def behind(self, seed: int, thinking: bool, reply: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        results = [{"type": "tool_result", "tool_use_id": id, "content": "1"} for id, *_ in self.calls(reply)]
        said = [own.model_dump(exclude_none=True) for own in reply.content if own.type != "thinking"]
        more = [{"role": "assistant", "content": said}, {"role": "user", "content": results}]
        return reply.usage.receipt, self.ask(seed, thinking, more=more).usage.receipt


@pytest.mark.parametrize("api", [Chat, Responses, Messages])
@pytest.mark.parametrize("thinking", [False, True])
def test_several_calls(small: Gateway, api: type[Chat], thinking: bool) -> None:
    asked, counts = api(small), set()
    with asked.client:
        for seed in SEEDS:
            reply = asked.ask(seed, thinking)
            calls = asked.calls(reply)
            counts.add(len(calls))
            assert len({id for id, *_ in calls}) == len(calls) >= 1
            told = asked.streamed(seed, thinking)
            assert [own[1:] for own in told] == [own[1:] for own in calls]
            before, after = asked.behind(seed, thinking, reply)
            assert after["cached"] + after["replayed"] >= before["prompt"] + before["generated"] - 1
            assert len(asked.calls(asked.ask(seed, thinking, parallel=False))) == 1
    assert max(counts) > 1
