"""Messages as turns in the shape that `runtime.text.chat` lays out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weft.gateway.apis.anthropic_types import AnthropicTool, Block, CountRequest, InputMessage, MessagesRequest
from weft.gateway.apis.common import conversation_of, namespace_of
from weft.gateway.chat.base import TurnRequest
from weft.gateway.http.base import Exchange
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError, UnsupportedError


def turn_request(exchange: Exchange, asked: CountRequest) -> TurnRequest:
    """Of a MessagesRequest, or of one whose tokens are to be counted."""
    messages: list[dict[str, Any]] = []
    if asked.system:
        messages.append({"role": "system", "content": _joined("system", asked.system)})
    for i, message in enumerate(asked.messages):
        messages += _messages(f"messages[{i}]", message)
    thinking = exchange.state.config.thinking
    if asked.thinking is not None:
        thinking = asked.thinking.type != "disabled"
    config = asked.output_config
    form = asked.output_format or (config.format if config is not None else None)
    schema = None
    if form is not None:
        schema = {"type": "json_schema", "json_schema": {"name": "reply", "schema": form.schema}}
    choice, parallel = _choice(asked)
    more: dict[str, Any] = {"params": SamplingParams()}
    if isinstance(asked, MessagesRequest):
        session, lease = conversation_of(exchange, asked.kv_hints, asked.session_id)
        more = {
            "params": _params(asked),
            "max_tokens": asked.max_tokens,
            "namespace": namespace_of(exchange.caller, asked.cache_salt),
            "session": session,
            "lease": lease,
        }
    return TurnRequest(
        messages=messages,
        tools=[_tool(f"tools[{i}]", tool) for i, tool in enumerate(asked.tools or ())],
        tool_choice=choice,
        parallel=parallel,
        response_format=schema,
        thinking=thinking,
        effort=config.effort if config is not None else None,
        **more,
    )


def _params(asked: MessagesRequest) -> SamplingParams:
    if asked.temperature is not None and not 0 <= asked.temperature <= 2:
        raise RequestError("temperature", asked.temperature, "not in 0..2")
    return SamplingParams(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or -1,
        stop=tuple(asked.stop_sequences or ()),
        seed=asked.seed,
    )


def _choice(asked: CountRequest) -> tuple[str | Mapping[str, Any], bool]:
    given = asked.tool_choice
    if given is None:
        return "auto", True
    parallel = not given.disable_parallel_tool_use
    if given.type == "tool":
        if given.name is None:
            raise RequestError("tool_choice.name", None, "a choice of a tool names it")
        return {"type": "function", "function": {"name": given.name}}, parallel
    return {"any": "required"}.get(given.type, given.type), parallel


def _tool(where: str, tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise UnsupportedError(f"{where}.type", tool.type, "tools of the server's own are not served")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _messages(where: str, message: InputMessage) -> list[dict[str, Any]]:
    if message.role == "system":
        return [{"role": "system", "content": _joined(f"{where}.content", message.content)}]
    if message.role == "assistant":
        return [_assistant(where, message.content)]
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    return _user(where, message.content)


def _user(where: str, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Results of tools, and texts between and behind them."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        if block.type == "tool_result":
            if block.tool_use_id is None:
                raise RequestError(f"{where}.content[{i}].tool_use_id", None, "a result answers a call")
            content = _joined(f"{where}.content[{i}].content", block.content or "")
            if block.is_error:
                content = f"Error: {content}"
            messages.append({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})
        else:
            texts.append(_text(f"{where}.content[{i}]", block))
    if texts or not messages:
        messages.append({"role": "user", "content": "\n\n".join(texts)})
    return messages


def _assistant(where: str, content: str | Sequence[Block]) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        if block.type == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + (block.thinking or "")
            message["signature"] = block.signature
        elif block.type == "tool_use":
            if block.id is None or block.name is None:
                raise RequestError(f"{at}.id", block.id, "a call has an id and a name")
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            function = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type != "redacted_thinking":
            message["content"] += _text(at, block)
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(where: str, content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(_text(f"{where}[{i}]", block) for i, block in enumerate(content))


def _text(where: str, block: Block) -> str:
    if block.type != "text":
        raise UnsupportedError(f"{where}.type", block.type, "DeepSeek-V4 reads text only")
    if block.text is None:
        raise RequestError(f"{where}.text", None, "a text block has text")
    return block.text
