"""Replies held to tools: random weights make well-formed calls, or none, in and out of thinking, at any depth."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from support.engine import EOS, byte_tokenizer, draft_always, finish, running
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.tool_calls import tool_grammar
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.errors import RequestError
from weft.runtime.text.chat import Prompt, render
from weft.runtime.text.chat_output import Reply, parse
from weft.runtime.text.tokens import DSML, THINK_END

DSML_ID, THINK_END_ID = (byte_tokenizer().encode(token)[0] for token in (DSML, THINK_END))
FIND = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"type": ["string", "null"], "enum": ["red", "green", None]},
    },
    "required": ["query", "kind"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "parameters": FIND}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
NAMED = {"type": "function", "function": {"name": "find"}}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


def asked(choice: Any, thinking: bool, seed: int, *, parallel: bool = True) -> tuple[Prompt, SamplingParams]:
    prompt = render(byte_tokenizer(), HI, thinking=thinking, tools=TOOLS, tool_choice=choice)
    opened = prompt.form.in_tool_calls
    grammar = tool_grammar(TOOLS, choice, thinking=thinking, opened=opened, parallel=parallel)
    # Random weights would think, and talk, for ever.
    bias = {THINK_END_ID: 5.0, DSML_ID: 9.0, 3 + ord("/"): 8.0, EOS: 6.0}
    bias |= {3 + ord(char): 9.0 if choice == "auto" else 3.0 for char in "\n<"}
    params = SamplingParams(max_tokens=500, seed=seed, temperature=1.0, grammar=grammar, logit_bias=bias)
    return prompt, params


def replies(choice: Any, thinking: bool, seeds: range, **options: Any) -> list[tuple[Output, Reply]]:
    """The same at depths 0, 1 and 4; those that come to an end."""
    outputs: list[list[Output]] = []
    for drafts in (0, 1, 4):
        with running(drafts=drafts, context=2048, tokens=9000) as engine:
            asked_ = [asked(choice, thinking, seed, **options) for seed in seeds]
            outputs.append(finish(together(engine, asked_)))
    for other in outputs[1:]:
        assert [o.tokens for o in other] == [o.tokens for o in outputs[0]]
    ended = [o for o in outputs[-1] if o.finish_reason == "stop"]
    assert len(ended) >= len(seeds) / 2, "random weights go on and on, but not all of them"
    return [(o, parse(o.text, asked_[0][0].form, "stop")) for o in ended]


async def together(engine: Engine, asked: list[tuple[Prompt, SamplingParams]]) -> list[Output]:
    return await asyncio.gather(*(engine.generate(prompt.tokens, params) for prompt, params in asked))


def check(reply: Reply) -> None:
    """Every call names a tool, was closed, and has arguments of its schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert reply.finish_reason == "tool_calls" and not reply.unparsed
    for call in reply.tool_calls:
        assert call.complete
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_that_are_required_are_made(choice: Any, thinking: bool) -> None:
    names = set()
    for output, reply in replies(choice, thinking, range(8)):
        assert reply.tool_calls and not reply.content
        check(reply)
        names |= {call.name for call in reply.tool_calls}
        assert output.tokens.count(THINK_END_ID) == thinking
    assert names == {"find"} if choice == NAMED else names <= {"find", "now"}


@pytest.mark.parametrize("thinking", [False, True])
def test_left_to_itself_it_calls_in_the_layout_or_not_at_all(thinking: bool) -> None:
    called = talked = 0
    for output, reply in replies("auto", thinking, range(8)):
        if reply.tool_calls:
            called += 1
            check(reply)
            end = output.text.index(THINK_END) if thinking else 0
            assert f"\n\n<{DSML}tool_calls>\n<{DSML}invoke" in output.text[end:] and DSML not in output.text[:end]
        else:
            talked += 1
            assert DSML_ID not in output.tokens and reply.finish_reason == "stop"
    assert called and talked


@pytest.mark.parametrize("thinking", [False, True])
def test_none_makes_none(thinking: bool) -> None:
    for output, reply in replies("none", thinking, range(3)):
        assert DSML_ID not in output.tokens and not reply.tool_calls


def test_one_call_at_a_time() -> None:
    for _, reply in replies("required", False, range(8), parallel=False):
        check(reply)
        assert len(reply.tool_calls) == 1


def test_a_tool_that_cannot_be_held_fails_its_own_call() -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}}}]  # fmt: skip
    params = SamplingParams(grammar=tool_grammar(tools))
    with (
        running() as engine,
        pytest.raises(RequestError, match=r"f\.a: .*uniqueItems") as caught,
    ):
        finish(engine.generate([5, 6], params))
    assert caught.value.field == "tool_calls"
