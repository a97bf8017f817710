"""A Responses request as a turn in the shape that `runtime.text.chat` lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.gateway.apis.common import conversation_of, namespace_of
from weft.gateway.apis.responses_types import InputItem, InputPart, ResponseRequest, ResponseTool
from weft.gateway.chat.base import TurnRequest
from weft.gateway.http.base import Exchange
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError, UnsupportedError


def items_of(asked: ResponseRequest) -> list[InputItem]:
    if isinstance(asked.input, str):
        return [InputItem(type="message", role="user", content=asked.input)]
    return asked.input


def turn_request(
    exchange: Exchange, asked: ResponseRequest, before: Sequence[InputItem], conversation: str
) -> TurnRequest:
    """before: items of the responses that it goes on from. conversation: that all of them are told by."""
    for name in ("conversation", "prompt"):
        if getattr(asked, name) is not None:
            raise UnsupportedError(name, "…", "use previous_response_id, or send the items")
    if asked.truncation not in (None, "disabled"):
        raise UnsupportedError("truncation", asked.truncation, "what does not fit is refused")
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    messages += messages_of([*before, *items_of(asked)], len(before))
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    thinking = exchange.state.config.thinking if effort is None else effort != "none"
    thinking = thinking if asked.thinking is None else asked.thinking
    session, lease = conversation_of(
        exchange, asked.kv_hints, asked.session_id, asked.prompt_cache_key, conversation or None
    )
    return TurnRequest(
        messages=messages,
        params=_params(asked),
        tools=[_tool(f"tools[{i}]", tool) for i, tool in enumerate(asked.tools or ())],
        tool_choice=_choice(asked),
        parallel=asked.parallel_tool_calls is not False,
        response_format=_format(asked),
        thinking=thinking,
        effort=None if effort == "none" else effort,
        max_tokens=asked.max_output_tokens,
        namespace=namespace_of(exchange.caller, asked.cache_salt),
        session=session,
        lease=lease,
    )


def _params(asked: ResponseRequest) -> SamplingParams:
    wanted = "message.output_text.logprobs" in (asked.include or ())
    return SamplingParams(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        logprobs=(asked.top_logprobs or 0) if wanted else None,
    )


def _tool(where: str, tool: ResponseTool) -> dict[str, Any]:
    if tool.type != "function":
        raise UnsupportedError(f"{where}.type", tool.type, "only functions are served")
    if tool.name is None:
        raise RequestError(f"{where}.name", None, "a function has a name")
    function: dict[str, Any] = {"name": tool.name}
    for name in ("description", "parameters", "strict"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return {"type": "function", "function": function}


def _choice(asked: ResponseRequest) -> str | Mapping[str, Any]:
    given = asked.tool_choice
    if given is None or isinstance(given, str):
        return given or "auto"
    name = given.name or (given.function.name if given.function is not None else None)
    if name is None:
        raise RequestError("tool_choice.name", None, "a choice of a function names it")
    return {"type": "function", "function": {"name": name}}


def _format(asked: ResponseRequest) -> dict[str, Any] | None:
    form = asked.text.format if asked.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema is None:
        raise RequestError("text.format.schema", None, "a json_schema format has one")
    schema: dict[str, Any] = {"name": form.name or "reply", "schema": form.schema}
    if form.strict is not None:
        schema["strict"] = form.strict
    return {"type": "json_schema", "json_schema": schema}


def messages_of(items: Sequence[InputItem], before: int) -> list[dict[str, Any]]:
    """Reasoning, text and calls that follow one another are one assistant turn. before: how many are of earlier
    requests."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, still open
    for i, item in enumerate(items):
        where, kind = f"input[{i - before}]", item.type or "message"
        if kind == "message" and item.role != "assistant":
            turn = None
            messages.append(_message(where, item))
        elif kind == "function_call_output":
            turn = None
            messages.append(_result(where, item))
        else:
            if turn is None or (kind == "reasoning" and len(turn) > 2):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add(where, kind, item, turn)
    return messages


def _message(where: str, item: InputItem) -> dict[str, Any]:
    if item.role is None:
        raise RequestError(f"{where}.role", None, "a message has a role")
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": text_of(f"{where}.content", item.content)}


def _result(where: str, item: InputItem) -> dict[str, Any]:
    if item.call_id is None:
        raise RequestError(f"{where}.call_id", None, "an output answers a call")
    return {"role": "tool", "tool_call_id": item.call_id, "content": text_of(f"{where}.output", item.output)}


def _add(where: str, kind: str, item: InputItem, turn: dict[str, Any]) -> None:
    if kind == "message":
        turn["content"] += text_of(f"{where}.content", item.content)
    elif kind == "function_call":
        if item.call_id is None or item.name is None:
            raise RequestError(f"{where}.call_id", item.call_id, "a call has a call_id and a name")
        function = {"name": item.name, "arguments": item.arguments or "{}"}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif kind == "reasoning":
        text = text_of(f"{where}.content", item.content) if item.content else ""
        if text:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
        if item.encrypted_content:
            turn["signature"] = item.encrypted_content
    else:
        raise UnsupportedError(f"{where}.type", kind, "not an item that can be read")


def text_of(where: str, content: str | list[InputPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        if part.type not in ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"):
            raise UnsupportedError(f"{where}[{i}].type", part.type, "DeepSeek-V4 reads text only")
        texts.append((part.refusal if part.type == "refusal" else part.text) or "")
    return "\n\n".join(texts)
