"""From what the model wrote to reasoning, content and tool calls, all at once or piece by piece.

deepseek-recipe does the parsing. Beside it the text is watched for one thing that it leaves open: which calls the
model really finished. It completes the arguments of a call as soon as it sees `</` and the DSML token, accepts
malformed tags, and ends with "tool_calls" whether the last call was cut off or not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import deepseek_recipe as recipe
import msgspec

from weft.runtime.text.tokens import DSML

FinishReason = Literal["stop", "length", "tool_calls"]


class ReplyFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Where in a reply the prompt ends, and what may follow.

    thinking: a thinking turn. resumes: the prompt ends inside the reasoning, or inside the content behind it.
    tool_calls: calls are looked for. in_tool_calls: the prompt has opened the block of calls.
    """

    thinking: bool = False
    resumes: Literal["reasoning", "content"] | None = None
    tool_calls: bool = False
    in_tool_calls: bool = False


class CallDelta(msgspec.Struct, frozen=True):
    """More of call `index`. The first of a call has its id and name; `arguments` are joined."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ReplyDelta(msgspec.Struct, frozen=True):
    """What a piece of text adds to the reply, in this order."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[CallDelta, ...] = ()


@dataclass
class ToolCall:
    """complete: closed by the model, and its arguments are a JSON object with distinct names. Only such a call
    may be run; the others were cut off or are malformed."""

    id: str
    name: str
    arguments: str
    complete: bool = False


@dataclass
class Reply:
    """reasoning: None outside thinking turns. finish_reason: tool_calls only if every call is complete and the
    model came to its end. unparsed: of the block of calls, the text that is in no call the model closed.
    """

    reasoning: str | None
    content: str
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    unparsed: str = ""


def parse(text: str, form: ReplyFormat, finish_reason: Literal["stop", "length"] = "stop") -> Reply:
    """A whole reply: the text that was drawn, without its EOS."""
    parser = ReplyParser(form)
    parser.feed(text)
    return parser.finish(finish_reason)[1]


class ReplyParser:
    """Feed it the text as it is drawn, then finish it. The deltas join to the reply, however the text is split."""

    def __init__(self, form: ReplyFormat) -> None:
        self._form = form
        self._stream = _stream(form)
        self._calls: list[_Call] = []
        self._closed = _ClosedCalls(form) if form.tool_calls else None
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def feed(self, text: str) -> ReplyDelta | None:
        """What can be said now; None if nothing can."""
        if self._closed is not None:
            self._closed.feed(text)
        return self._delta(self._stream.push(recipe.InferenceChunk.text(text)))

    def finish(self, reason: Literal["stop", "length"]) -> tuple[ReplyDelta | None, Reply]:
        """The text has ended, for the engine's `reason`: what was still held back, and the whole."""
        end = recipe.InferenceFinishReason.Stop if reason == "stop" else recipe.InferenceFinishReason.Length
        events = [*self._stream.push(recipe.InferenceChunk.finish(end)), *self._stream.finish()]
        delta = self._delta(events)
        calls = [call.done() for call in self._calls]
        complete = all(call.complete for call in calls)
        reply = Reply(
            reasoning="".join(self._reasoning) if self._form.thinking else None,
            content="".join(self._content),
            tool_calls=calls,
            finish_reason="tool_calls" if calls and complete and reason == "stop" else reason,
            unparsed=self._closed.rest if self._closed is not None else "",
        )
        return delta, reply

    def _delta(self, events: list[Any]) -> ReplyDelta | None:
        reasoning, content = [], []
        calls: list[CallDelta] = []
        for event in events:
            for choice in _DECODER.decode(event.to_json()).choices:
                reasoning.append(choice.delta.reasoning_content or "")
                content.append(choice.delta.content or "")
                calls += (self._call_delta(call) for call in choice.delta.tool_calls)
        closed = self._closed.count if self._closed is not None else 0
        # The brace that ends a call's arguments waits until the call is closed.
        freed = (call.free(i) for i, call in enumerate(self._calls[:closed]))
        calls = [call for call in (*calls, *freed) if call.arguments or call.name]
        self._reasoning += reasoning
        self._content += content
        delta = ReplyDelta("".join(reasoning), "".join(content), tuple(calls))
        return delta if delta != _NOTHING else None

    def _call_delta(self, part: _CallPart) -> CallDelta:
        if part.index == len(self._calls):
            self._calls.append(_Call(part.id or "", part.function.name or ""))
        call = self._calls[part.index]
        return CallDelta(part.index, call.take(part.function.arguments), part.id, part.function.name)


@dataclass
class _Call:
    id: str
    name: str
    shown: list[str] = field(default_factory=list)
    held: str = ""

    def take(self, arguments: str) -> str:
        """What to show of more arguments."""
        text = self.held + arguments
        self.held = "}" if text.endswith("}") else ""
        self.shown.append(text.removesuffix("}"))
        return self.shown[-1]

    def free(self, index: int) -> CallDelta:
        held, self.held = self.held, ""
        self.shown.append(held)
        return CallDelta(index, held)

    def done(self) -> ToolCall:
        """If the call was not closed, its last brace was never freed, and its arguments are no object."""
        arguments = "".join(self.shown)
        return ToolCall(self.id, self.name, arguments, _is_object(arguments))


_State = Literal["content", "calls", "call", "parameter", "after", "broken"]


class _ClosedCalls:
    """Counts the calls of a block that are written exactly as the layout has them, up to the first thing that is
    not. Takes time linear in the text, however it is split."""

    def __init__(self, form: ReplyFormat) -> None:
        self.count = 0
        self._state: _State = "calls" if form.in_tool_calls else "content"
        self._rest: list[str] = []
        self._tail = ""  # not understood yet

    def feed(self, text: str) -> None:
        text, at = self._tail + text, 0
        while self._state in _TAGS:
            begin = _BEGIN[self._state].search(text, at)
            at = self._pass(text, at, begin.start() if begin else max(at, len(text) - _LONGEST_BEGIN))
            if begin is None:
                break
            tags = ((pattern.match(text, at), state) for pattern, state in _TAGS[self._state])
            end, state = next(((tag.end(), state) for tag, state in tags if tag), (len(text), None))
            if state is not None and end - at <= _LONGEST_TAG:
                at = self._enter(text, at, end, state)
            elif text.find("\n", at) < 0 and len(text) - at < _LONGEST_TAG:
                break  # no tag goes over a line's end: this one may still be cut short
            else:
                self._state = "broken"
        if self._state not in _TAGS:
            at = self._pass(text, at, len(text))
        self._tail = text[at:]

    @property
    def rest(self) -> str:
        """The text from the block on that is in no closed call; nothing if it is only the block's end."""
        content = self._state == "content" and not _BEGIN["content"].match(self._tail)
        text = "".join(self._rest) + ("" if content else self._tail)
        return text if text.strip("\n") else ""

    def _enter(self, text: str, at: int, end: int, state: _State) -> int:
        """Go behind the tag text[at:end]."""
        closed = self._state == "call" and state == "calls"
        self.count += closed
        ended = state == "after" and self.count > 0
        self._state = state
        self._pass(text, at, end)
        if closed or ended:
            self._rest.clear()
        return end

    def _pass(self, text: str, at: int, end: int) -> int:
        """Leave text[at:end] behind; what comes before the block is content, and nobody's concern."""
        if self._state != "content" and end > at:
            self._rest.append(text[at:end])
        return end


_NAME = 'name="[^"\n]*"'
_TAGS: dict[_State, tuple[tuple[re.Pattern[str], _State], ...]] = {
    "content": ((re.compile(f"<{DSML}tool_calls>"), "calls"),),
    "calls": (
        (re.compile(f"<{DSML}invoke {_NAME}>"), "call"),
        (re.compile(f"</{DSML}tool_calls>"), "after"),
    ),
    "call": (
        (re.compile(f'<{DSML}parameter {_NAME} string="(?:true|false)">'), "parameter"),
        (re.compile(f"</{DSML}invoke>"), "calls"),
    ),
    "parameter": ((re.compile(f"</{DSML}parameter>"), "call"),),
}
# What makes the recipe see a tag; in content and in a parameter, fewer things than between them.
_BEGIN = {
    "content": re.compile(f"<{DSML}"),
    "calls": re.compile(f"</?{DSML}"),
    "call": re.compile(f"</?{DSML}"),
    "parameter": re.compile(f"</{DSML}"),
}
_LONGEST_BEGIN = len(f"</{DSML}") - 1
_LONGEST_TAG = 4096


def _stream(form: ReplyFormat) -> recipe.StreamProcessor:
    stage = None
    if form.thinking:
        stage = _STAGES[form.resumes]
    # The request's own part in the events is their model and id, which nobody reads.
    request = recipe.ConversationRequest(recipe.Conversation(), recipe.ModelVersion.DeepseekV4Pro)
    options = recipe.ParsingOptions(
        parse_tool_calls=form.tool_calls,
        starts_in_tool_calls=form.in_tool_calls,
        thinking_initial_stage=stage,
    )
    return recipe.StreamProcessor(recipe.ChatCompletionRequest.chunk_generator(request, "", ""), options)


_STAGES = {
    None: recipe.ThinkingInitialStage.ReasoningStart,
    "reasoning": recipe.ThinkingInitialStage.ReasoningContinuation,
    "content": recipe.ThinkingInitialStage.ContentContinuation,
}


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments, object_pairs_hook=_distinct, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class _FunctionPart(msgspec.Struct):
    name: str | None = None
    arguments: str = ""


class _CallPart(msgspec.Struct):
    index: int
    function: _FunctionPart
    id: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallPart] = []


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    """The part of a chat.completion.chunk that is read."""

    choices: list[_Choice] = []


_DECODER = msgspec.json.Decoder(_Chunk)
_NOTHING = ReplyDelta()
