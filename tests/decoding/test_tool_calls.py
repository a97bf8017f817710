"""The grammar of tool calls against deepseek-recipe, which lays calls out, and jsonschema, which judges them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.runtime.decoding.grammar import Grammars
from weft.runtime.decoding.params import Grammar
from weft.runtime.decoding.tool_calls import tool_grammar
from weft.runtime.errors import RequestError
from weft.runtime.text.chat import render
from weft.runtime.text.chat_output import ReplyFormat, parse
from weft.runtime.text.tokenizer import byte_tokenizer
from weft.runtime.text.tokens import ASSISTANT, DSML, EOS, THINK_END

PLACE = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
FIND = {
    "type": "object",
    "$defs": {"Place": PLACE},
    "properties": {
        "query": {"type": "string", "minLength": 1, "maxLength": 12, "description": "what to look for"},
        "count": {"type": ["integer", "null"]},
        "kind": {"enum": ["red", "green", 3, None]},
        "place": {"$ref": "#/$defs/Place"},
        "places": {"type": "array", "items": {"$ref": "#/$defs/Place"}, "maxItems": 2},
        "code": {"anyOf": [{"type": "string", "pattern": "^[a-c]+/?$"}, {"type": "null"}]},
        "more": {},
    },
    "required": ["query", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": FIND, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
BLOCK = f"\n\n<{DSML}tool_calls>\n"


@cache
def grammars() -> Grammars:
    return Grammars(byte_tokenizer())


def accepts(grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    matcher = grammars()._compile(grammar)
    tokens = byte_tokenizer().encode(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def laid_out(*calls: tuple[str, Any]) -> str:
    """The block of calls as DeepSeek's own encoder writes it."""
    made = [
        {"id": str(i), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    results = [{"role": "tool", "content": "", "tool_call_id": call["id"]} for call in made]
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": made},
        *results,
    ]
    text = render(byte_tokenizer(), messages, thinking=False).text
    return text[text.index(ASSISTANT + THINK_END) + len(ASSISTANT + THINK_END) : text.index(EOS)]


GOOD: list[dict[str, Any]] = [
    {"query": "a", "kind": "red"},
    {"query": "</b> \n<x>", "count": 12, "kind": 3},
    {"query": "é", "kind": None, "place": {"x": -1}, "places": [{"x": 1}, {"x": 2}]},
    {"query": "q", "count": None, "kind": "green", "places": [], "code": "abc/", "more": "free"},
    {"query": "q", "kind": "green", "code": None, "more": {"a": [1, "b"]}},
]
BAD: list[dict[str, Any]] = [
    {"query": "a"},
    {"kind": "red"},
    {"query": "", "kind": "red"},
    {"query": "a" * 13, "kind": "red"},
    {"query": "a", "kind": "blue"},
    {"query": "a", "kind": 4},
    {"query": 5, "kind": "red"},
    {"query": "a", "count": 1.5, "kind": "red"},
    {"query": "a", "count": "1", "kind": "red"},
    {"query": "a", "kind": "red", "place": {"y": 1}},
    {"query": "a", "kind": "red", "places": [{"x": 1}] * 3},
    {"query": "a", "kind": "red", "code": "abd"},
    {"query": "a", "kind": "red", "other": 1},
]


def test_calls_that_fit_their_schema_are_taken_and_no_others() -> None:
    grammar = tool_grammar(TOOLS, "required")
    for arguments in GOOD:
        jsonschema.validate(arguments, FIND)
        assert accepts(grammar, laid_out(("find", arguments))), arguments
    for arguments in BAD:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(arguments, FIND)
        assert not accepts(grammar, laid_out(("find", arguments))), arguments
    assert accepts(grammar, laid_out(("now", {})))
    assert not accepts(grammar, laid_out(("then", {})))


def test_choices_and_several_calls() -> None:
    one, two = laid_out(("now", {})), laid_out(("now", {}), ("find", GOOD[0]), ("now", {}))
    assert accepts(tool_grammar(TOOLS, "required"), two)
    assert not accepts(tool_grammar(TOOLS, "required", parallel=False), two)
    assert accepts(tool_grammar(TOOLS, "required", parallel=False), one)
    named = tool_grammar(TOOLS, {"type": "function", "function": {"name": "find"}})
    assert accepts(named, laid_out(("find", GOOD[0]))) and not accepts(named, one)
    opened = tool_grammar(TOOLS, "required", opened=True)
    assert accepts(opened, two.removeprefix(BLOCK)) and not accepts(opened, two)
    auto = tool_grammar(TOOLS)
    assert auto is not None and auto.optional and accepts(auto, two.removeprefix(f"\n\n<{DSML}"))
    empty_line = one.replace('"now">\n', '"now">\n\n')  # as encoding_dsv4.py of the first release lays it out
    assert empty_line != one and accepts(tool_grammar(TOOLS, "required"), empty_line)
    form = tool_grammar(TOOLS, "auto", answer='{"type": "boolean"}')
    assert accepts(form, "true") and accepts(form, two) and not accepts(form, "maybe")
    assert tool_grammar([]) is None and tool_grammar(TOOLS, "none") is not None


def tool(schema: dict[str, Any], strict: bool) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "string", "pattern": "a|^b"}, "pattern"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ],
)
def test_what_cannot_be_held_is_refused_of_strict_tools_only(schema: dict[str, Any], named: str) -> None:
    whole = {"type": "object", "properties": {"own": schema}, "required": ["own"]}
    with pytest.raises(RequestError, match=rf"f\.own.*{named}") as caught:
        accepts(tool_grammar(tool(whole, strict=True), "required"), "")
    assert caught.value.field == "tool_calls"
    value = {"array": [1, 1], "string": "anything", "object": {"a": 1}}[schema["type"]]
    lenient = tool_grammar(tool(whole, strict=False), "required")
    assert accepts(lenient, laid_out(("f", {"own": value}))) and not accepts(lenient, laid_out(("f", {"own": 5})))


@pytest.mark.parametrize(
    "properties",
    [{"a": False}, {"a": {"$ref": "#/$defs/none"}}, {"a": {"$ref": "other.json"}}, {'quo"te': {"type": "string"}}],
)
def test_what_no_call_could_have_is_refused(properties: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        accepts(tool_grammar(tool({"type": "object", "properties": properties}, strict=False), "required"), "")


VALUES: dict[str, tuple[dict[str, Any], st.SearchStrategy[Any]]] = {
    "text": ({"type": "string"}, st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    "number": ({"type": "integer"}, st.integers(-(10**12), 10**12)),
    "flag": ({"type": "boolean"}, st.booleans()),
    "list": (
        {"type": "array", "items": {"type": ["string", "number"]}},
        st.lists(st.text('ab"\\\né', max_size=4)),
    ),
    "maybe": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, st.none() | st.text(max_size=4)),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)
@given(
    data=st.data(), names=st.permutations(sorted(VALUES)), required=st.integers(0, 5), given_=st.integers(0, 31)
)
def test_any_arguments_come_back_as_they_were(
    data: st.DataObject, names: list[str], required: int, given_: int
) -> None:
    """Laid out by DeepSeek's encoder, taken by the grammar, read by its parser."""
    schema = {"type": "object", "properties": {n: VALUES[n][0] for n in names}, "required": names[:required]}
    arguments = {
        name: data.draw(VALUES[name][1]) for i, name in enumerate(names) if i < required or given_ >> i & 1
    }
    text = laid_out(("f", arguments))
    if byte_tokenizer().encode(text).count(byte_tokenizer().encode(DSML)[0]) != 4 + 2 * len(arguments):
        return  # a text spells DSML out
    assert accepts(tool_grammar(tool(schema, strict=True), "required"), text)
    (call,) = parse(text, ReplyFormat(tool_calls=True)).tool_calls
    assert call.complete and json.loads(call.arguments) == arguments


def test_llguidance_knows_dsml_as_one_token() -> None:
    own = byte_tokenizer()
    known = llguidance.LLTokenizer(own.to_json(), n_vocab=own.size, eos_token=own.eos)
    assert known.is_special_token(own.encode(DSML)[0])
