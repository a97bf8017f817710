"""SGLang's own API as it goes over the wire. Fields that Weft does not know are passed over."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from weft.gateway.apis.openai_types import CachedDetails
from weft.gateway.chat.base import Receipt

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class NativeSampling(msgspec.Struct, kw_only=True):
    """dtype-like fields come as a regex from SGLang's own client."""

    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    sampling_seed: Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)] | None = None
    logit_bias: dict[str, float] | None = None
    regex: str | None = None
    json_schema: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    custom_params: Any = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    """text or input_ids, one or several. logprob_start_len: from which token of the prompt on log-probabilities
    are given; a request that draws nothing gets those behind it, which is what SGLang's `select` reckons with."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    stream: bool = False
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: Count | None = None
    return_text_in_logprobs: bool | None = None
    rid: str | list[str] | None = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    input_embeds: Any = None
    lora_path: str | list[str | None] | None = None
    custom_logit_processor: Any = None
    return_hidden_states: bool = False
    session_id: str | None = None
    session_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    kv_hints: dict[str, Any] | None = None


class FinishReason(msgspec.Struct, omit_defaults=True):
    type: str
    length: int | None = None
    matched: str | int | None = None


class Meta(msgspec.Struct, kw_only=True):
    """Entries of log-probabilities are [value, token id, text or null]."""

    id: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_tokens_details: CachedDetails = msgspec.field(default_factory=CachedDetails)
    reasoning_tokens: int = 0
    computed_tokens: int | msgspec.UnsetType = msgspec.UNSET
    replayed_tokens: int | msgspec.UnsetType = msgspec.UNSET
    matched_tokens: int | msgspec.UnsetType = msgspec.UNSET
    cache_reason: str | msgspec.UnsetType = msgspec.UNSET
    first_token_latency: float | msgspec.UnsetType = msgspec.UNSET
    weight_version: str = "default"
    num_retractions: int = 0
    dp_rank: int = 0
    e2e_latency: float | msgspec.UnsetType = msgspec.UNSET
    spec_verify_ct: int | msgspec.UnsetType = msgspec.UNSET
    spec_accept_length: float | msgspec.UnsetType = msgspec.UNSET
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET
    input_token_logprobs: list[list[Any]] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs: list[list[Any]] | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[list[list[Any]] | None] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[list[Any]]] | msgspec.UnsetType = msgspec.UNSET


class Generated(msgspec.Struct, kw_only=True):
    """text: of a stream, all of it so far."""

    text: str
    meta_info: Meta
    output_ids: list[int] = []
    index: int | msgspec.UnsetType = msgspec.UNSET


class ModelInfo(msgspec.Struct, kw_only=True):
    model_path: str
    tokenizer_path: str
    is_generation: bool = True
    model_type: str = ""
    context_length: int = 0


class ServerInfo(msgspec.Struct, kw_only=True):
    model_path: str
    model_type: str
    served_model_name: str
    version: str
    context_length: int
    num_hidden_layers: int
    kv_bytes: int
    max_running_requests: int
    internal_states: list[dict[str, Any]] = []


class Prefixes(msgspec.Struct):
    src_rids: list[str]
    dst_rid: str


class AbortRequest(msgspec.Struct, kw_only=True):
    rid: str = ""
    abort_all: bool = False


class TokenizeRequest(msgspec.Struct, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class Tokenized(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class Detokenized(msgspec.Struct):
    text: str
