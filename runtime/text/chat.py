"""Chat turns as DeepSeek-V4's tokens: deepseek-recipe lays them out, Weft's tokenizer encodes them.

Only what the layout itself puts there becomes a special token; text that spells one stays text. A turn the model
has drawn keeps the tokens it was drawn as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import deepseek_recipe as recipe
import msgspec

from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError, RequestError
from weft.runtime.text.chat_output import ReplyFormat
from weft.runtime.text.chat_request import convert
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import ASSISTANT, BOS, EOS, LEADING, THINK_END, THINK_START, TRAILING, USER

# Which texts ask for reasoning effort: those of the first release, or those of the 0731 refresh and later ones.
Generation = Literal["april", "0731"]

_ENCODING = recipe.DeepseekV4Encoding()
_CONTROL = frozenset((*LEADING, *TRAILING))
# deepseek-recipe knows the later texts: none for low, A for high, B for max. In the first release A was the text
# of max, and there was no other.
_EFFORT: dict[Generation, dict[str | None, Literal["low", "high", "max"]]] = {
    "april": {None: "low", "low": "low", "high": "low", "xhigh": "high", "max": "high"},
    "0731": {None: "high", "low": "low", "high": "high", "xhigh": "high", "max": "max"},
}


class Prompt(msgspec.Struct, frozen=True):
    """What the model reads before its turn.

    text: as rendered. tokens: what to compute; those of turns already drawn are theirs, whatever the text says.
    opening: how many tokens at the end belong to the turn to be drawn: they stand behind its <｜Assistant｜>.
    form: how to read what is drawn.
    """

    text: str
    tokens: list[int]
    opening: int
    form: ReplyFormat


def generation_of(config: ModelConfig) -> Generation:
    """The refresh is told by its draft stages; nothing else in its config.json differs."""
    return "april" if config.dspark_block_size is None else "0731"


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] = "auto",
    response_format: Mapping[str, Any] | None = None,
    generation: Generation = "april",
    drawn: Sequence[Sequence[int] | None] = (),
) -> Prompt:
    """The prompt of the next assistant turn. Messages, tools and formats have the shape of Chat Completions.

    thinking: the turn begins with reasoning. In that mode reasoning of turns before the last user message is left
    out, unless tools are declared. effort: minimal to max, only read when thinking; None is the checkpoint's own.
    drawn: for each assistant message in turn, its tokens from behind <｜Assistant｜> on (`Prompt.opening`
    and what was drawn), or None to encode its text; an EOS at the end is as good as none.
    Errors are `RequestError`, or `UnsupportedError` for what this layout has no place for, and name the field.
    """
    request = convert(
        messages,
        thinking=thinking,
        effort=effort,
        tools=tools,
        tool_choice=tool_choice,
        response_format=response_format,
    )
    return encode(tokenizer, request, generation=generation, drawn=drawn)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the layout tells the model about tools, to stand where a system text does."""
    return _system_text(tools, None)


def format_text(response_format: Mapping[str, Any]) -> str:
    """What the layout tells the model about the form of replies, to stand where a system text does. The layout has
    no place for it beside tools."""
    return _system_text((), response_format)


def _system_text(tools: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None) -> str:
    asked = [{"role": "user", "content": "json"}]
    request = convert(
        asked, thinking=False, effort=None, tools=tools, tool_choice="auto", response_format=response_format
    )
    text: str = _ENCODING.render_conversation(request.conversation).prompt
    return text[: text.index(USER)].removeprefix(BOS)


def encode(
    tokenizer: Tokenizer,
    request: recipe.ConversationRequest,
    *,
    generation: Generation = "april",
    drawn: Sequence[Sequence[int] | None] = (),
) -> Prompt:
    """`render` for a request that deepseek-recipe has converted, from any of its protocols."""
    conversation = _with_effort_of(generation, request.conversation)
    rendered = _ENCODING.render_conversation(conversation)
    count = sum(message.role == "assistant" for message in conversation.messages)
    if len(drawn) > count:
        raise RequestError("drawn", len(drawn), f"there are {count} assistant messages")
    tokens: list[int] = []
    turn, begin = -1, 0
    for text, control in _segments(rendered):
        if control and text == EOS:
            tokens[begin:] = _as_drawn(tokens[begin:], turn, drawn, tokenizer)
        tokens += [_control(tokenizer, text)] if control else tokenizer.encode_plain(text)
        if control and text == ASSISTANT:
            turn, begin = turn + 1, len(tokens)
    tokens[begin:] = _as_drawn(tokens[begin:], turn, drawn, tokenizer)
    return Prompt(rendered.prompt, tokens, len(tokens) - begin, _form(request.parsing_options))


def _with_effort_of(generation: Generation, given: recipe.Conversation) -> recipe.Conversation:
    if not given.thinking_mode:
        return given
    return recipe.Conversation(
        given.messages,
        thinking_mode=True,
        tools=given.tools,
        tool_choice=given.tool_choice,
        reasoning_effort=_EFFORT[generation][given.reasoning_effort],
        response_format="json_object" if given.response_format == "json_object" else "text",
        response_schema=given.response_schema,
        response_regex=given.response_regex,
    )


def _segments(rendered: recipe.RenderedPrompt) -> Iterator[tuple[str, bool]]:
    """The prompt in parts, each a special token of V4 or text between two of them."""
    end = 0
    for start, stop in rendered.special_ranges:
        token = rendered.prompt[start:stop]
        # The recipe also marks tokens of other models, for places in images, where an answer spells them.
        if token in _CONTROL:
            if end < start:
                yield rendered.prompt[end:start], False
            yield token, True
            end = stop
    if end < len(rendered.prompt):
        yield rendered.prompt[end:], False


def _control(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise CheckpointError(f"tokenizer.json lacks the token {token}")
    return ids[0]


def _as_drawn(
    rendered: list[int], turn: int, drawn: Sequence[Sequence[int] | None], tokenizer: Tokenizer
) -> list[int]:
    """A turn's tokens behind its <｜Assistant｜>: as they were drawn, in the form in which they were rendered,
    with or without the reasoning. Text never encodes to a special token, so those in `rendered` are the layout's.
    """
    given = drawn[turn] if 0 <= turn < len(drawn) else None
    if given is None:
        return rendered
    tokens = list(given)
    if tokens[-1:] == [tokenizer.eos]:
        tokens.pop()
    start, end = _control(tokenizer, THINK_START), _control(tokenizer, THINK_END)
    if tokens[:1] not in ([start], [end]):
        raise RequestError(f"drawn[{turn}]", tokens[:1], f"must begin with {THINK_START} or {THINK_END}")
    cut = tokens.index(end) if end in tokens else len(tokens)
    reasoning, answer = tokens[1:cut], tokens[cut + 1 :]
    if end not in rendered:
        return rendered if answer else [start, *reasoning]
    if cut == len(tokens) and rendered[-1] != end:
        return rendered  # an answer found in reasoning that no token ends
    return [start, *reasoning, end, *answer] if rendered[0] == start else [end, *answer]


def _form(options: recipe.ParsingOptions) -> ReplyFormat:
    stage = options.thinking_initial_stage
    resumes: Literal["reasoning", "content"] | None = None
    if stage == recipe.ThinkingInitialStage.ReasoningContinuation:
        resumes = "reasoning"
    elif stage == recipe.ThinkingInitialStage.ContentContinuation:
        resumes = "content"
    return ReplyFormat(
        thinking=stage is not None,
        resumes=resumes,
        tool_calls=options.parse_tool_calls,
        in_tool_calls=options.starts_in_tool_calls,
    )
