"""What the APIs share: who is asking for which model, sampling, and the usage that is reported."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from weft.gateway.apis.openai_types import (
    CachedDetails,
    Common,
    CompletionDetails,
    PromptDetails,
    SglExt,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from weft.gateway.chat.base import Ended, Receipt
from weft.gateway.chat.drawing import Lease
from weft.gateway.http.base import Exchange
from weft.gateway.http.errors import HttpError
from weft.gateway.http.hints import lease_of
from weft.gateway.http.keys import Caller
from weft.gateway.http.sessions import is_final, session_of
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import ASSISTANT, THINK_END, THINK_START

_DEFAULTS = SamplingParams()


def check_model(exchange: Exchange, model: str) -> str:
    """The name a client calls the model by, if it is one."""
    names = exchange.state.config.names
    if model in names or "*" in names:
        return model
    reason = f"there is no model {model[:80]!r}; this server has {', '.join(names)}"
    raise HttpError(404, reason, code="model_not_found", field="model")


def namespace_of(caller: Caller, salt: str | None) -> str:
    """Of KV: each key's own, and within it each salt's."""
    return f"{caller.namespace}/{salt}" if salt else caller.namespace


def conversation_of(
    exchange: Exchange, hints: Mapping[str, Any] | None, *named: str | None
) -> tuple[str | None, float | None]:
    """The session that a request belongs to, and for how long its KV is to be leased; None for the server's
    time."""
    headers = exchange.request.headers
    session = session_of(headers, *named)
    if session is None:
        return None, None
    return session, 0.0 if is_final(headers) else lease_of(hints)


def sampling(asked: Common, **more: Any) -> SamplingParams:
    """OpenAI's parameters, and those beside them, but for lengths and grammars."""
    given = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "repetition_penalty": asked.repetition_penalty,
        "min_tokens": asked.min_tokens,
        "seed": asked.seed,
        "stop": (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        "stop_token_ids": tuple(asked.stop_token_ids or ()),
        "ignore_eos": asked.ignore_eos,
        "logit_bias": _biases(asked.logit_bias),
        **more,
    }
    return msgspec.structs.replace(_DEFAULTS, **{k: v for k, v in given.items() if v is not None})


def _biases(given: Mapping[str, float] | None) -> dict[int, float]:
    for token in given or ():
        if not (token.isascii() and token.isdigit() and len(token) < 16):
            raise RequestError("logit_bias", token, "keys are token ids")
    return {int(token): bias for token, bias in (given or {}).items()}


def usage_of(ends: Sequence[Ended]) -> Usage:
    """Of one request's replies; its prompt counts once."""
    return usage([end.receipt for end in ends], sum(end.reasoning for end in ends))


def usage(receipts: Sequence[Receipt], reasoning: int = 0) -> Usage:
    prompt = max((receipt.prompt for receipt in receipts), default=0)
    generated = sum(receipt.generated for receipt in receipts)
    accepted = sum(receipt.accepted for receipt in receipts)
    return Usage(
        prompt,
        generated,
        prompt + generated,
        PromptDetails(max((receipt.cached for receipt in receipts), default=0)),
        CompletionDetails(reasoning, accepted, sum(receipt.drafted for receipt in receipts) - accepted),
        list(receipts),
    )


def extension(asked: Common, cached: int) -> SglExt | msgspec.UnsetType:
    """In a stream it goes with the end of a reply: some clients take no chunk without one."""
    return SglExt(CachedDetails(cached)) if asked.return_cached_tokens_details else msgspec.UNSET


def logprob_entries(tokenizer: Tokenizer, found: Sequence[m.Logprob], top: int) -> list[TokenLogprob]:
    """top: how many alternatives were asked for."""
    entries = []
    for own in found:
        tops = [_top(tokenizer, token, logprob) for token, logprob in own.top[:top]]
        plain = _top(tokenizer, own.token, own.logprob)
        entries.append(TokenLogprob(plain.token, plain.logprob, plain.bytes, tops))
    return entries


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    return TopLogprob(tokenizer.decode([token]), max(logprob, -9999.0), list(tokenizer.token_bytes(token)))


def thinks(text: str | None) -> bool:
    """Whether a text ends inside a thought: a grammar then holds behind it."""
    return text is not None and text.rfind(THINK_START) > max(text.rfind(THINK_END), text.rfind(ASSISTANT))


def now() -> int:
    return int(time.time())


def lease_for(
    exchange: Exchange, salt: str | None, hints: Mapping[str, Any] | None, *named: str | None
) -> Lease | None:
    """Of the KV behind a request, for its conversation, if it has one."""
    session, seconds = conversation_of(exchange, hints, *named)
    if session is None:
        return None
    return Lease(exchange.state.sessions, namespace_of(exchange.caller, salt), session, seconds)
