"""OpenAI's Chat Completions, Completions and Models as they go over the wire.

Fields that Weft does not know are passed over, as OpenAI's other servers do; those it knows and cannot honour are
refused by name where they are read. Beyond OpenAI's own, requests take what vLLM and SGLang take beside them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from weft.gateway.chat.base import Receipt

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]

# -- what is asked ------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """reasoning_content: what the assistant thought; `reasoning` is another name for it. prefix: of the last
    message: it is to be continued."""

    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    prefix: bool = False


class FunctionDefinition(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: FunctionName


class SchemaOfReply(msgspec.Struct, kw_only=True):
    schema: dict[str, Any]
    name: str = "reply"
    description: str | None = None
    strict: bool | None = None


class ReplyFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: SchemaOfReply | None = None
    regex: str | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive"]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Common(msgspec.Struct, kw_only=True):
    """Of chat and text completions. cache_salt: only requests with the same one share KV. session_id,
    prompt_cache_key: name a conversation, whose KV is leased between its turns. kv_hints: as other servers take
    them.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    kv_hints: dict[str, Any] | None = None
    user: str | None = None
    return_cached_tokens_details: bool = False


class ChatRequest(Common, kw_only=True):
    messages: list[ChatMessage]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ReplyFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None


class CompletionRequest(Common, kw_only=True):
    """prompt: a text, the ids of its tokens, or a list of either."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    regex: str | None = None
    json_schema: str | None = None


# -- what is answered ---------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct):
    """receipts: of each generation, Weft's own."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    receipts: list[Receipt] = []


class CachedDetails(msgspec.Struct):
    """Cached tokens by where their KV was."""

    device: int = 0
    host: int = 0
    storage: int = 0


class SglExt(msgspec.Struct):
    """What SGLang's clients look for (`return_cached_tokens_details`)."""

    cached_tokens_details: CachedDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(msgspec.Struct):
    index: int
    message: ReplyMessage
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sglext: SglExt | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str = msgspec.field(default_factory=str)


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    sglext: SglExt | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: TextLogprobs | None = None


class Completion(msgspec.Struct, kw_only=True):
    """Whole, or a piece of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    sglext: SglExt | msgspec.UnsetType = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class Model(msgspec.Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int
    owned_by: str = "weft"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"
