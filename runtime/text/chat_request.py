"""From messages in the Chat Completions shape to deepseek-recipe's conversation, with errors that say where.

deepseek-recipe checks what the parts of a request mean together (tool results that answer calls, "json" in the
prompt of a json_object request); its errors name no field. The shape is checked here first, field by field.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import deepseek_recipe as recipe
import msgspec

from weft.runtime.errors import RequestError, UnsupportedError

EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A field that would be dropped without a word is refused by name."""


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


_Content = str | list[_Part]


class _System(_Strict):
    role: Literal["system"]
    content: _Content
    name: str | None = None


class _User(_Strict):
    role: Literal["user"]
    content: _Content
    name: str | None = None


class _Reminder(_Strict):
    role: Literal["latest_reminder"]
    content: _Content


class _Arguments(_Strict):
    name: str
    arguments: str


class _Call(_Strict):
    id: str
    type: Literal["function"]
    function: _Arguments


class _Assistant(_Strict):
    """The last four are what OpenAI's client sends back of a reply, empty."""

    role: Literal["assistant"]
    content: _Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    prefix: bool = False
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class _Tool(_Strict):
    role: Literal["tool"]
    content: _Content
    tool_call_id: str
    name: str | None = None


class _Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Definition(_Strict):
    type: Literal["function"]
    function: _Function


class _Named(_Strict):
    name: str


class _Choice(_Strict):
    type: Literal["function"]
    function: _Named


class _Format(_Strict):
    type: Literal["text", "json_object"]


class _RegexFormat(_Strict):
    type: Literal["regex"]
    regex: str


class _Schema(_Strict):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class _SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: _Schema


_ROLES: dict[str, type[_Strict]] = {
    "system": _System,
    "user": _User,
    "assistant": _Assistant,
    "tool": _Tool,
    "latest_reminder": _Reminder,
}
_FORMATS: dict[str, type[_Strict]] = {
    "text": _Format,
    "json_object": _Format,
    "json_schema": _SchemaFormat,
    "regex": _RegexFormat,
}


def convert(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    effort: str | None,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    response_format: Mapping[str, Any] | None,
) -> recipe.ConversationRequest:
    """The request as deepseek-recipe reads it. RequestError and UnsupportedError name the field."""
    _check_messages(messages)
    for i, tool in enumerate(tools):
        _shape(tool, _Definition, f"tools[{i}]")
    _check_choice(tool_choice, tools)
    if effort is not None and effort not in EFFORTS:
        raise RequestError("effort", effort, f"must be one of {', '.join(EFFORTS)}")
    fields = {
        "model": '"DeepSeek-V4-Pro"',  # the recipe's name for the V4 layout
        "thinking": '{"type": "enabled"}' if thinking else '{"type": "disabled"}',
        "messages": f"[{', '.join(_json(f'messages[{i}]', message) for i, message in enumerate(messages))}]",
    }
    if effort is not None and thinking:
        fields["reasoning_effort"] = _json("effort", effort)
    if tools:
        fields["tools"] = f"[{', '.join(_json(f'tools[{i}]', tool) for i, tool in enumerate(tools))}]"
        # The recipe has a thinking turn choose for itself; a grammar makes it call (`decoding.tool_calls`).
        made = "auto" if thinking and tool_choice != "none" else tool_choice
        fields["tool_choice"] = _json("tool_choice", made)
    if response_format is not None:
        _shape(response_format, _kind(response_format, "type", _FORMATS, "response_format"), "response_format")
        fields["response_format"] = _json("response_format", response_format)
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    try:
        return recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    except (recipe.ConversionError, ValueError) as error:
        raise request_error(error, fields) from error


# What messages of deepseek-recipe contain, in the order to look; the first one found names the field.
_SIGNS = (
    ("invalid JSON request", "body"),
    ("tool_choice", "tool_choice"),
    ("'tool_call'", "tool_choice"),
    ("response_format", "response_format"),
    ("Tool names", "tools"),
    ("for function", "tools"),
    ("tool parameters", "tools"),
    ("json schema", "response_format"),
    ("no properties", "response_format"),
    ("n value", "n"),
    ("top_p", "top_p"),
    ("temperature", "temperature"),
    ("max_tokens", "max_tokens"),
    ("model names", "model"),
)


def request_error(error: Exception, fields: Mapping[str, Any]) -> RequestError:
    """An error of deepseek-recipe as ours. It names no field, so the nearest one is told from its message.

    fields: the request's, whose values the error shows.
    """
    reason = str(error)
    if isinstance(error, recipe.ConversionError):
        reason = json.loads(error.body)["error"]["message"]
    path = re.search(r"\b(?:messages|tools)(?:\[\d+\]|\.\w+)+", reason)
    field = path[0] if path else next((name for sign, name in _SIGNS if sign in reason), "messages")
    if field == "response_format" and field not in fields:
        field = "tools"  # both hold schemas
    return RequestError(field, _short(fields.get(re.split(r"\W", field)[0])), reason)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise RequestError("messages", messages, "must not be empty")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, dict) and message.get("role") == "developer":
            reason = "DeepSeek-V4 keeps it for its search agent; use system"
            raise UnsupportedError(f"{where}.role", "developer", reason)
        read = _shape(message, _kind(message, "role", _ROLES, where), where)
        if isinstance(read, _Assistant) and read.prefix and i + 1 < len(messages):
            raise RequestError(f"{where}.prefix", True, "only the last message can be continued")
        content = message.get("content")
        # The layout has a text for what a tool returned beside text; nothing of the kind for other roles.
        for j, part in enumerate(content if isinstance(content, list) and message["role"] != "tool" else ()):
            if part["type"] != "text":
                reason = "DeepSeek-V4 reads text only"
                raise UnsupportedError(f"{where}.content[{j}].type", part["type"], reason)


def _check_choice(choice: str | Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
    if choice in ("auto", "none"):
        return
    if choice != "required":
        if isinstance(choice, str):
            raise RequestError("tool_choice", choice, "must be auto, none, required or name a function")
        _shape(choice, _Choice, "tool_choice")
    if not tools:
        raise RequestError("tool_choice", choice, "there are no tools to choose from")
    if isinstance(choice, Mapping) and choice["function"]["name"] not in [t["function"]["name"] for t in tools]:
        raise RequestError("tool_choice.function.name", choice["function"]["name"], "there is no such tool")


def _kind(value: Any, key: str, kinds: Mapping[str, type[_Strict]], where: str) -> type[_Strict]:
    """The shape that the value's own `key` says it has."""
    if not isinstance(value, dict):
        raise RequestError(where, _short(value), "must be an object")
    name = value.get(key)
    if not isinstance(name, str) or name not in kinds:
        raise RequestError(f"{where}.{key}", _short(name), f"must be one of {', '.join(kinds)}")
    return kinds[name]


def _shape(value: Any, kind: type[_Strict], where: str) -> _Strict:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        path = path.removesuffix("`")
        found = value
        for step in re.findall(r"\w+", path):
            found = found[int(step) if isinstance(found, list) else step]
        raise RequestError(where + path, _short(found), reason) from None


def _json(field: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError too
        raise RequestError(field, type(value).__name__, f"not JSON: {error}") from None
    return text


def _short(value: Any) -> Any:
    """What an error shows of a value, which may be long, deep or not even JSON."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:80] + "…"
    return reprlib.repr(value)
