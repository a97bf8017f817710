"""Chat Completions' messages and options as `runtime.text.chat` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from weft.gateway.apis.common import conversation_of, namespace_of, sampling
from weft.gateway.apis.openai_types import ChatMessage, ChatRequest, ContentPart
from weft.gateway.chat.base import TurnRequest
from weft.gateway.http.base import Exchange
from weft.runtime.errors import RequestError, UnsupportedError


def turn_request(exchange: Exchange, asked: ChatRequest) -> TurnRequest:
    for name in ("functions", "function_call", "audio"):
        if getattr(asked, name) is not None:
            raise UnsupportedError(name, "…", "use tools" if name != "audio" else "DeepSeek-V4 writes text only")
    if asked.modalities not in (None, ["text"]):
        raise UnsupportedError("modalities", asked.modalities, "DeepSeek-V4 writes text only")
    thinking, effort = _thinking(asked, exchange.state.config.thinking)
    hints = (exchange, asked.kv_hints, asked.session_id, asked.prompt_cache_key)
    session, lease = conversation_of(*hints)
    return TurnRequest(
        messages=[plain(f"messages[{i}]", message) for i, message in enumerate(asked.messages)],
        params=sampling(asked, logprobs=_logprobs(asked)),
        tools=[msgspec.to_builtins(tool) for tool in asked.tools or ()],
        tool_choice=_choice(asked),
        parallel=asked.parallel_tool_calls is not False,
        response_format=_format(asked),
        thinking=thinking,
        effort=effort,
        max_tokens=asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens,
        n=asked.n or 1,
        namespace=namespace_of(exchange.caller, asked.cache_salt),
        session=session,
        lease=lease,
    )


def plain(where: str, message: ChatMessage) -> dict[str, Any]:
    """The fields that its role has."""
    content = _content(message.content)
    match message.role:
        case "assistant":
            own: dict[str, Any] = {"role": "assistant", "content": content or message.refusal or ""}
            reasoning = message.reasoning_content or message.reasoning
            if reasoning:
                own["reasoning_content"] = reasoning
            if message.tool_calls:
                own["tool_calls"] = msgspec.to_builtins(message.tool_calls)
            if message.prefix:
                own["prefix"] = True
            return own
        case "tool":
            if message.tool_call_id is None:
                raise RequestError(f"{where}.tool_call_id", None, "a tool message answers a call")
            return {"role": "tool", "content": content or "", "tool_call_id": message.tool_call_id}
    role = "system" if message.role == "developer" else message.role
    if content is None:
        raise RequestError(f"{where}.content", None, "must be text, or a list of parts")
    return {"role": role, "content": content}


def _content(content: str | list[ContentPart] | None) -> Any:
    if content is None or isinstance(content, str):
        return content
    parts = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        kind = "text" if part.type in ("text", "refusal", "input_text", "output_text") else part.type
        parts.append({"type": kind, "text": text or ""})
    return parts


def _thinking(asked: ChatRequest, default: bool) -> tuple[bool, str | None]:
    """Whether the turn thinks, and how hard. `thinking` comes first, then the template's argument, then the
    effort."""
    effort = asked.reasoning_effort
    own = (asked.chat_template_kwargs or {}).get("thinking")
    if own is None:
        own = (asked.chat_template_kwargs or {}).get("enable_thinking")
    if own is not None and not isinstance(own, bool):
        raise RequestError("chat_template_kwargs.thinking", own, "must be true or false")
    thinks = default if effort is None else effort != "none"
    if own is not None:
        thinks = own
    if asked.thinking is not None:
        thinks = asked.thinking.type != "disabled"
    return thinks, None if effort == "none" else effort


def _logprobs(asked: ChatRequest) -> int | None:
    if asked.top_logprobs and not asked.logprobs:
        raise RequestError("top_logprobs", asked.top_logprobs, "needs logprobs: true")
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _choice(asked: ChatRequest) -> str | Mapping[str, Any]:
    if asked.tool_choice is None or isinstance(asked.tool_choice, str):
        return asked.tool_choice or "auto"
    named: dict[str, Any] = msgspec.to_builtins(asked.tool_choice)
    return named


def _format(asked: ChatRequest) -> dict[str, Any] | None:
    given = asked.response_format
    if given is None or given.type == "text":
        return None
    if given.type == "json_schema":
        if given.json_schema is None:
            raise RequestError("response_format.json_schema", None, "a json_schema format has one")
        return {"type": "json_schema", "json_schema": msgspec.to_builtins(given.json_schema)}
    if given.type == "regex":
        if given.regex is None:
            raise RequestError("response_format.regex", None, "a regex format has one")
        return {"type": "regex", "regex": given.regex}
    return {"type": given.type}
