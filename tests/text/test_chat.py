"""The layout of chats, whole prompts written out, and what has no place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from support.chat import ASSISTANT, BOS, EOS, TOOLS, USER, D, assistant, byte_tokenizer, call, result, system, user
from weft.runtime.config import preset
from weft.runtime.errors import RequestError, UnsupportedError
from weft.runtime.text.chat import Generation, generation_of, render
from weft.runtime.text.chat_output import ReplyFormat

EFFORT_A = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered \
alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
EFFORT_B = """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying \
cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain \
that no assumption remains unchecked and no error remains undiscovered.

"""
TOOLS_TEXT = f"""\n\n## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{D}tool_calls>" block like the following:

<{D}tool_calls>
<{D}invoke name="$TOOL_NAME">
<{D}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}parameter>
...
</{D}invoke>
<{D}invoke name="$TOOL_NAME2">
...
</{D}invoke>
</{D}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{{"name": "weather", "description": "Wetter für \\"eine\\" Stadt", "parameters": {{"type": "object", \
"properties": {{"city": {{"type": "string"}}, "days": {{"type": "integer"}}}}, "required": ["city"]}}}}
{{"name": "now", "description": "", "parameters": {{}}}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def shown(messages: Sequence[dict[str, Any]], *, thinking: bool = False, **options: Any) -> str:
    """The prompt's text, once its tokens were found to be that text."""
    prompt = render(byte_tokenizer(), messages, thinking=thinking, **options)
    assert byte_tokenizer().decode(prompt.tokens) == prompt.text
    return prompt.text


# -- layout ------------------------------------------------------------------------------------------------


def test_chat() -> None:
    history = [system("Be brief."), user("Hi"), assistant("Hello", "hidden"), user("Bye")]
    assert shown(history) == (f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello{EOS}{USER}Bye{ASSISTANT}</think>")


def test_users_in_a_row_are_one_turn_and_systems_go_to_the_front() -> None:
    history = [
        system("A"),
        user("1"),
        system("B"),
        user("2"),
        {"role": "user", "content": [{"type": "text", "text": "3"}]},
    ]
    assert shown(history) == f"{BOS}A\n\nB{USER}1\n\n2\n\n3{ASSISTANT}</think>"


def test_thinking_drops_earlier_reasoning() -> None:
    history = [user("Hi"), assistant("Hello", "greet"), user("Bye"), assistant("Ciao", "part"), user("?")]
    assert shown(history, thinking=True) == (
        f"{BOS}{USER}Hi{ASSISTANT}</think>Hello{EOS}{USER}Bye{ASSISTANT}</think>Ciao{EOS}{USER}?{ASSISTANT}<think>"
    )


def test_thinking_keeps_reasoning_where_tools_are_declared() -> None:
    history = [system("S"), user("Hi"), assistant("Hello", "greet"), user("Bye"), assistant("Ciao"), user("?")]
    assert shown(history, thinking=True, tools=TOOLS) == (
        f"{BOS}S{TOOLS_TEXT}{USER}Hi{ASSISTANT}<think>greet</think>Hello{EOS}"
        f"{USER}Bye{ASSISTANT}<think></think>Ciao{EOS}{USER}?{ASSISTANT}<think>"
    )


def test_tools_without_a_system_message_and_tools_not_to_be_used() -> None:
    assert shown([user("Hi")], tools=TOOLS) == f"{BOS}{TOOLS_TEXT}{USER}Hi{ASSISTANT}</think>"
    assert shown([user("Hi")], tools=TOOLS, tool_choice="none") == f"{BOS}{USER}Hi{ASSISTANT}</think>"


TOOL_TURNS = [
    user("Weather?"),
    assistant(
        "Looking.",
        "two calls",
        tool_calls=[
            call("a", "weather", '{"city": "Köln \\"Süd\\"\\n<b>", "days": 2, "more": {"x": [true, null]}}'),
            call("b", "now", "{}"),
            call("c", "now", "not JSON"),
        ],
    ),
    result("b", "noon"),
    result("c", [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]),
    result("a", "rain"),
    user("So?"),
]
CALLS_TEXT = f"""Looking.

<{D}tool_calls>
<{D}invoke name="weather">
<{D}parameter name="city" string="true">Köln "Süd"\n<b></{D}parameter>
<{D}parameter name="days" string="false">2</{D}parameter>
<{D}parameter name="more" string="false">{{"x": [true, null]}}</{D}parameter>
</{D}invoke>
<{D}invoke name="now">
</{D}invoke>
<{D}invoke name="now">
<{D}parameter name="arguments" string="true">not JSON</{D}parameter>
</{D}invoke>
</{D}tool_calls>{EOS}"""
RESULTS_TEXT = (
    f"{USER}<tool_result>rain</tool_result>\n\n<tool_result>noon</tool_result>\n\n"
    f"<tool_result>x\n\n[Unsupported Image]</tool_result>"
)


def test_tool_calls_and_results_in_the_order_of_the_calls() -> None:
    assert shown(TOOL_TURNS, thinking=True, tools=TOOLS) == (
        f"{BOS}{TOOLS_TEXT}{USER}Weather?{ASSISTANT}<think>two calls</think>{CALLS_TEXT}"
        f"{RESULTS_TEXT}\n\nSo?{ASSISTANT}<think>"
    )


def test_a_tool_result_is_a_user_turn_so_reasoning_before_it_is_dropped_without_tools() -> None:
    assert shown(TOOL_TURNS[:-1], thinking=True) == (
        f"{BOS}{USER}Weather?{ASSISTANT}</think>{CALLS_TEXT}{RESULTS_TEXT}{ASSISTANT}<think>"
    )


def test_required_tool_choice_opens_the_block() -> None:
    prompt = render(byte_tokenizer(), [user("Hi")], thinking=False, tools=TOOLS, tool_choice="required")
    assert prompt.text == f"{BOS}{TOOLS_TEXT}{USER}Hi{ASSISTANT}</think>\n\n<{D}tool_calls>\n"
    assert prompt.form == ReplyFormat(tool_calls=True, in_tool_calls=True)
    assert byte_tokenizer().decode(prompt.tokens[-prompt.opening :]) == f"</think>\n\n<{D}tool_calls>\n"


def test_in_a_thinking_turn_a_grammar_makes_the_calls_that_are_required() -> None:
    auto = render(byte_tokenizer(), [user("Hi")], thinking=True, tools=TOOLS)
    for choice in ("required", {"type": "function", "function": {"name": TOOLS[0]["function"]["name"]}}):
        assert render(byte_tokenizer(), [user("Hi")], thinking=True, tools=TOOLS, tool_choice=choice) == auto
    assert auto.form == ReplyFormat(thinking=True, tool_calls=True)


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert shown([system("S"), user("Hi")], response_format=wanted) == (
        f"{BOS}S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "object", "properties": {{"ü": {{"type": "string"}}}}}}{USER}Hi{ASSISTANT}</think>'
    )
    assert f'"ü": {{"type": "string"}}}}}}{USER}Hi{ASSISTANT}<think>' in shown(
        [user("Hi")], thinking=True, response_format=wanted
    )
    assert "JSON object ONLY" in shown([user("json")], thinking=True, response_format={"type": "json_object"})
    assert shown([user("json")], response_format={"type": "json_object"}) == (
        f"{BOS}\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\n"
        f"Reply with JSON object ONLY.{USER}json{ASSISTANT}</think>"
    )
    for plain in ({"type": "text"}, {"type": "regex", "regex": "a+"}):
        assert shown([user("Hi")], response_format=plain) == f"{BOS}{USER}Hi{ASSISTANT}</think>"


def test_latest_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "Be kind."}
    assert shown([system("S"), reminder, user("Hi")], thinking=True) == (
        f"{BOS}S<｜latest_reminder｜>Be kind.{USER}Hi{ASSISTANT}<think>"
    )


def test_continuation_of_the_last_message() -> None:
    assert shown([user("Hi"), assistant("Once", None, prefix=True)]) == f"{BOS}{USER}Hi{ASSISTANT}</think>Once"
    prompt = render(byte_tokenizer(), [user("Hi"), assistant("Once", "r", prefix=True)], thinking=True)
    assert prompt.text == f"{BOS}{USER}Hi{ASSISTANT}<think>r</think>Once"
    assert prompt.form == ReplyFormat(thinking=True, resumes="content")
    prompt = render(byte_tokenizer(), [user("Hi"), assistant("", "r", prefix=True)], thinking=True)
    assert prompt.text == f"{BOS}{USER}Hi{ASSISTANT}<think>r"
    assert prompt.form == ReplyFormat(thinking=True, resumes="reasoning")


EFFORTS: dict[Generation, dict[str | None, str]] = {
    "april": {None: "", "minimal": "", "low": "", "medium": "", "high": "", "xhigh": EFFORT_A, "max": EFFORT_A},
    "0731": {
        **{None: EFFORT_A, "minimal": "", "low": ""},
        **{"medium": EFFORT_A, "high": EFFORT_A, "xhigh": EFFORT_A, "max": EFFORT_B},
    },
}


@pytest.mark.parametrize(
    ("generation", "effort", "text"), [(g, e, text) for g, table in EFFORTS.items() for e, text in table.items()]
)
def test_effort(generation: Generation, effort: str | None, text: str) -> None:
    history = [system("S"), user("Hi")]
    options: dict[str, Any] = {"effort": effort, "generation": generation, "tools": TOOLS}
    expected = f"{BOS}{text}S{TOOLS_TEXT}{USER}Hi{ASSISTANT}<think>"
    assert shown(history, thinking=True, **options) == expected
    assert text not in shown(history, **options) or not text  # only thinking turns are told how hard to think


def test_generation_is_told_by_the_draft_stages() -> None:
    config = preset("flash").to_dict()
    assert generation_of(preset("flash")) == "april"
    assert generation_of(type(preset("flash")).from_dict({**config, "dspark_block_size": 4})) == "0731"


# -- what is refused ---------------------------------------------------------------------------------------

HI = [user("Hi")]
CALLING = assistant("c", tool_calls=[call("x", "f", "{}")])
REFUSED: list[tuple[str, type[RequestError], dict[str, Any]]] = [
    ("messages", RequestError, {"messages": []}),
    ("messages[0]", RequestError, {"messages": ["Hi"]}),
    ("messages[0].role", RequestError, {"messages": [{"content": "Hi"}]}),
    ("messages[0].role", RequestError, {"messages": [{"role": "tutor", "content": "Hi"}]}),
    ("messages[1].role", UnsupportedError, {"messages": [*HI, {"role": "developer", "content": "Hi"}]}),
    ("messages[0]", RequestError, {"messages": [{"role": "user"}]}),
    ("messages[0].content", RequestError, {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0]", RequestError, {"messages": [user("\ud800")]}),
    ("messages[0]", RequestError, {"messages": [{**HI[0], "mood": "good"}]}),
    (
        "messages[0].content[1].type",
        UnsupportedError,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
    ),
    ("messages[1].function_call", RequestError, {"messages": [*HI, assistant("a", function_call={"name": "f"})]}),
    ("messages", RequestError, {"messages": [*HI, assistant(None)]}),
    (
        "messages[1].tool_calls[0].function.arguments",
        RequestError,
        {"messages": [*HI, assistant("a", tool_calls=[call("x", "f", {})])]},  # type: ignore[arg-type]
    ),
    ("messages[1].prefix", RequestError, {"messages": [*HI, assistant("a", prefix=True), *HI]}),
    ("messages", RequestError, {"messages": [*HI, CALLING, *HI]}),
    ("messages", RequestError, {"messages": [*HI, CALLING, result("y", "r")]}),
    ("effort", RequestError, {"effort": "most"}),
    ("tools[0]", RequestError, {"tools": [{"type": "function"}]}),
    ("tools[1].type", RequestError, {"tools": [TOOLS[0], {"type": "web_search", "function": {"name": "f"}}]}),
    ("tools[0].function.name", RequestError, {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tools", RequestError, {"tools": [TOOLS[0], TOOLS[0]]}),
    (
        "tools",
        RequestError,
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
    ),
    (
        "tools[0]",
        RequestError,
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": float("nan")}}}]},
    ),
    ("tool_choice", RequestError, {"tool_choice": "required", "thinking": False}),
    (
        "tool_choice.function.name",
        RequestError,
        {"tools": TOOLS, "thinking": False, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    ("tool_choice", RequestError, {"tools": TOOLS, "tool_choice": "maybe"}),
    ("response_format.type", RequestError, {"response_format": {"type": "xml"}}),
    ("response_format", RequestError, {"response_format": {"type": "json_object"}}),
    ("response_format.json_schema", RequestError, {"response_format": {"type": "json_schema", "json_schema": {}}}),
]


@pytest.mark.parametrize(
    ("field", "kind", "change"), REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)]
)
def test_refused(field: str, kind: type[RequestError], change: dict[str, Any]) -> None:
    options = {"messages": HI, "thinking": True, **change}
    with pytest.raises(RequestError) as raised:
        render(byte_tokenizer(), **options)
    assert (raised.value.field, type(raised.value)) == (field, kind)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_schema_too_deep_for_the_recipe() -> None:
    for depth in (200, 100_000):
        schema: dict[str, Any] = {}
        for _ in range(depth):
            schema = {"a": schema}
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        with pytest.raises(RequestError, match="recursion"):
            render(byte_tokenizer(), HI, thinking=False, tools=tools)
