"""Assistant turns that may call tools: V4's own layout, calls held to the tools' schemas, results as tokens."""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.backend.executor.leaves import Held, Plain
from weft.backend.executor.tools import Tool, ToolError, as_text, tool
from weft.runtime.decoding.params import Grammar
from weft.runtime.decoding.tool_calls import tool_grammar
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError
from weft.runtime.text.chat import tools_text
from weft.runtime.text.chat_output import Reply, ReplyFormat, ToolCall, parse

if TYPE_CHECKING:
    from weft.backend.executor.state import State


class Toolbox:
    """Tools that a model may call, under their names."""

    def __init__(self, *tools: Tool | Callable[..., Any]) -> None:
        self.tools: dict[str, Tool] = {}
        for own in tools:
            made = own if isinstance(own, Tool) else tool(own)
            if made.name in self.tools:
                raise RequestError("tools", made.name, "there are two of this name")
            self.tools[made.name] = made
        self.declared = [own.declared for own in self.tools.values()]
        self._grammars: dict[str, Grammar | None] = {}

    @property
    def text(self) -> str:
        """What the layout tells the model about them; stands behind the system text."""
        return tools_text(self.declared) if self.declared else ""

    def grammar(self, choice: str | Mapping[str, Any], thinking: bool, parallel: bool) -> Grammar | None:
        key = json.dumps([choice, thinking, parallel])
        if key not in self._grammars:
            self._grammars[key] = tool_grammar(self.declared, choice, thinking=thinking, parallel=parallel)
        return self._grammars[key]


@dataclass(frozen=True)
class Result:
    """Of one call. value: what the tool returned; error: why it did not. text: what the model was told."""

    call: ToolCall
    value: Any
    error: ToolError | None
    text: str


@dataclass(frozen=True)
class Turn:
    """An assistant turn. results: of its calls, in order; empty if it made none, or was cut off."""

    reply: Reply
    results: list[Result] = field(default_factory=list)

    @property
    def content(self) -> str:
        return self.reply.content


def take_turn(
    state: State,
    name: str,
    toolbox: Toolbox,
    choice: str | Mapping[str, Any],
    parallel: bool,
    sampling: dict[str, Any],
) -> Turn:
    """Draw an assistant turn; run its calls at the same time, and append their results as a user turn."""
    thinking = state.lane.ground.template.name.endswith("thinking")
    grammar = toolbox.grammar(choice, thinking, parallel)
    state.assistant(Held(name, grammar, **sampling))
    meta = state.get_meta_info(name)
    text = state[name]
    reason = "length" if meta["finish_reason"]["type"] == "length" else "stop"
    form = ReplyFormat(thinking=thinking, tool_calls=choice != "none" and bool(toolbox.tools))
    reply = parse(text, form, reason)  # type: ignore[arg-type]
    if reply.finish_reason != "tool_calls":
        return Turn(reply)
    results = run_calls(state, toolbox, reply.tool_calls)
    told = "".join(f"<tool_result>{result.text}</tool_result>" for result in results)
    state.user(Plain(told))
    return Turn(reply, results)


def run_calls(state: State, toolbox: Toolbox, calls: Sequence[ToolCall]) -> list[Result]:
    """All at the same time; the state's KV is leased meanwhile. A failure is a result like others: what it says is
    told to the model."""
    context = contextvars.copy_context()
    lane = state.lane
    outside = lane.ground.outside

    async def one(call: ToolCall) -> Result:
        began = time.monotonic()
        try:
            own = toolbox.tools.get(call.name)
            if own is None:
                raise ToolError(call.name, {}, f"there is no such tool, only {', '.join(toolbox.tools)}", 0)
            value = await own.run(json.loads(call.arguments), outside, context)
            return Result(call, value, None, as_text(own.name, value))
        except ToolError as error:
            return Result(call, None, error, f"Error: {error.reason}")
        finally:
            lane.scope.tell("tool", lane.path, call.name, m.Usage(total=time.monotonic() - began))

    async def all_of_them() -> list[Result]:
        return list(await asyncio.gather(*map(one, calls)))

    patience = max((toolbox.tools[c.name].patience for c in calls if c.name in toolbox.tools), default=0.0)
    return lane.leased(patience, all_of_them)
