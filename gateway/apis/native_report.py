"""SGLang's meta information of a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weft.backend.convert import token_entry, top_entries
from weft.gateway.apis.native_types import FinishReason, GenerateRequest, Meta
from weft.gateway.apis.openai_types import CachedDetails
from weft.gateway.chat.continuation import Finished
from weft.runtime.engine import messages as m
from weft.runtime.text.tokenizer import Tokenizer


def whole_meta(tokenizer: Tokenizer, asked: GenerateRequest, end: Finished, id: str) -> Meta:
    took = end.receipt
    reason = FinishReason("length", length=took.generated)
    if end.reason == "stop":
        reason = FinishReason("stop", matched=end.stop)
    steps = max(1, took.generated - took.accepted)
    meta = Meta(
        id=id,
        finish_reason=reason,
        prompt_tokens=len(end.work.tokens),
        completion_tokens=took.generated,
        cached_tokens=took.cached,
        cached_tokens_details=CachedDetails(took.cached),
        computed_tokens=took.computed,
        replayed_tokens=took.replayed,
        matched_tokens=took.matched,
        cache_reason=took.reason,
        first_token_latency=took.first_token,
        e2e_latency=took.total,
        spec_verify_ct=steps,
        spec_accept_length=took.generated / steps,
        receipt=took,
    )
    tell_logprobs(meta, tokenizer, asked, end.logprobs, end.prompt_logprobs)
    if asked.return_logprob and end.work.scored == 0:
        first = end.work.tokens[0]
        meta.input_token_logprobs = [_first(first, _text_of(tokenizer, asked)), *_given(meta)]
        if asked.top_logprobs_num:
            tops = meta.input_top_logprobs
            meta.input_top_logprobs = [None, *(tops if isinstance(tops, list) else ())]
    return meta


def _given(meta: Meta) -> list[list[Any]]:
    return meta.input_token_logprobs if isinstance(meta.input_token_logprobs, list) else []


def _first(token: int, text_of: Callable[[int], str] | None) -> list[Any]:
    """The first token of all has nothing to be conditioned on."""
    return [None, token, text_of(token) if text_of else None]


def _text_of(tokenizer: Tokenizer, asked: GenerateRequest) -> Callable[[int], str] | None:
    return (lambda id: tokenizer.decode([id])) if asked.return_text_in_logprobs else None


def tell_logprobs(
    meta: Meta,
    tokenizer: Tokenizer,
    asked: GenerateRequest,
    output: Sequence[m.Logprob],
    prompt: Sequence[m.Logprob] = (),
) -> None:
    """If they were asked for."""
    if not asked.return_logprob:
        return
    text_of = _text_of(tokenizer, asked)
    meta.output_token_logprobs = [token_entry(own, text_of) for own in output]
    meta.input_token_logprobs = [token_entry(own, text_of) for own in prompt]
    if asked.top_logprobs_num:
        meta.output_top_logprobs = [top_entries(own, text_of) for own in output]
        meta.input_top_logprobs = [top_entries(own, text_of) for own in prompt]
