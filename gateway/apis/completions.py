"""POST /v1/completions: text behind text, as it stands. A BOS is put before a text that lacks one."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from weft.gateway.apis.common import check_model, extension, lease_for, namespace_of, now, sampling
from weft.gateway.apis.common import usage as usage_of
from weft.gateway.apis.openai_types import Completion, CompletionRequest, TextChoice, TextLogprobs, Usage
from weft.gateway.chat.continuation import Continuation, Finished, Piece, gather, stream
from weft.gateway.chat.encoding import tokens_of
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.sse import DONE
from weft.runtime.decoding.params import Grammar
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError, UnsupportedError
from weft.runtime.text.tokenizer import Tokenizer

_MOST = 128  # replies to a request
_DEFAULT = 16  # tokens, as OpenAI's


async def completions(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: CompletionRequest = exchange.body
    model, state = check_model(exchange, asked.model), exchange.state
    works = await _works(exchange, asked)
    head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "created": now(), "model": model}
    if asked.stream:
        return await _stream(exchange, asked, head, works)
    ends = await gather(state.engine, works, state.metrics.generated)
    choices = []
    for end in ends:
        own = _Reply(state.engine.tokenizer, asked, end.work)
        text, found = own.head(end.prompt_logprobs)
        behind = own.logprobs(end.logprobs)
        choices.append(TextChoice(end.index, text + end.text, end.reason, _joined(found, behind)))
    told = _usage(ends, asked.n or 1)
    return Answer(
        Completion(
            **head, choices=choices, usage=told, sglext=extension(asked, told.prompt_tokens_details.cached_tokens)
        )
    )


async def _works(exchange: Exchange, asked: CompletionRequest) -> list[Continuation]:
    """One for each reply: those of a prompt side by side."""
    if asked.suffix:
        raise UnsupportedError("suffix", asked.suffix, "DeepSeek-V4 writes forward only")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise UnsupportedError("best_of", asked.best_of, "ask for n, and choose")
    engine, n = exchange.state.engine, asked.n or 1
    prompts = await _prompts(engine, asked.prompt)
    if len(prompts) * n > _MOST:
        raise RequestError("prompt", len(prompts), f"at most {_MOST} replies in all")
    most = _DEFAULT if asked.max_tokens is None else asked.max_tokens
    params = sampling(asked, logprobs=asked.logprobs, grammar=_grammar(asked), max_tokens=most).validate()
    seed = random.getrandbits(62) if params.seed is None else params.seed
    scored = 0 if asked.echo and asked.logprobs is not None else None
    lease = lease_for(exchange, asked.cache_salt, asked.kv_hints, asked.session_id, asked.prompt_cache_key)
    works = [
        Continuation(
            tokens,
            msgspec.structs.replace(params, seed=seed + i),
            namespace_of(exchange.caller, asked.cache_salt),
            scored,
            lease if place == i == 0 else None,
            f"prompt[{place}]" if len(prompts) > 1 else "prompt",
        )
        for place, tokens in enumerate(prompts)
        for i in range(n)
    ]
    for work in works:
        work.check(engine)
    return works


def _weight(asked: CompletionRequest) -> int:
    one = isinstance(asked.prompt, str) or not asked.prompt or isinstance(asked.prompt[0], int)
    return (asked.n or 1) * (1 if one else len(asked.prompt))


def _grammar(asked: CompletionRequest) -> Grammar | None:
    if asked.regex is not None and asked.json_schema is not None:
        raise RequestError("regex", asked.regex, "cannot be combined with json_schema")
    if asked.regex is not None:
        return Grammar("regex", asked.regex)
    return None if asked.json_schema is None else Grammar("json_schema", asked.json_schema)


async def _prompts(engine: Engine, given: str | list[Any]) -> list[list[int]]:
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    parts: list[Any] = [given] if one else list(given)
    prompts = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            raise RequestError(f"prompt[{i}]", part, "texts and token ids do not mix")
        if isinstance(part, str):
            tokens = await tokens_of(engine.tokenizer, "prompt", part)
            tokens = tokens if tokens[:1] == [engine.tokenizer.bos] else [engine.tokenizer.bos, *tokens]
        else:
            tokens = engine.tokens(part)
        if not tokens:
            raise RequestError("prompt", part, "must not be empty")
        prompts.append(tokens)
    if not prompts:
        raise RequestError("prompt", given, "must not be empty")
    return prompts


class _Reply:
    """Texts and log-probabilities of one reply, with their places in it."""

    def __init__(self, tokenizer: Tokenizer, asked: CompletionRequest, work: Continuation) -> None:
        self._tokenizer, self._asked, self._work = tokenizer, asked, work
        self._offset = 0

    def head(self, found: Sequence[m.Logprob]) -> tuple[str, TextLogprobs | None]:
        """The prompt, if it is to be echoed. found: of its tokens but the first."""
        if not self._asked.echo:
            return "", None
        own = list(self._work.tokens)
        with_bos = own[:1] == [self._tokenizer.bos]
        text = self._tokenizer.decode(own[1:] if with_bos else own)
        if self._asked.logprobs is None:
            return text, None
        # Without a BOS the first token has nothing to be conditioned on.
        first = None if with_bos else self._first(own[0])
        return text, _joined(first, self.logprobs(found))

    def _first(self, token: int) -> TextLogprobs:
        text = self._tokenizer.decode([token])
        self._offset += len(text)
        return TextLogprobs([text], [None], [None] if self._asked.logprobs else None, [0])

    def logprobs(self, found: Sequence[m.Logprob]) -> TextLogprobs | None:
        top = self._asked.logprobs
        if top is None:
            return None
        decode = self._tokenizer.decode
        tokens, offsets = [decode([own.token]) for own in found], []
        for text in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        tops: list[dict[str, float] | None] = [
            {decode([token]): max(logprob, -9999.0) for token, logprob in own.top[:top]} for own in found
        ]
        values: list[float | None] = [max(own.logprob, -9999.0) for own in found]
        return TextLogprobs(tokens, values, tops if top else None, offsets)


def _joined(first: TextLogprobs | None, second: TextLogprobs | None) -> TextLogprobs | None:
    if first is None or second is None:
        return first or second
    tops = None if second.top_logprobs is None else [*(first.top_logprobs or ()), *second.top_logprobs]
    return TextLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        tops,
        first.text_offset + second.text_offset,
    )


def _usage(ends: Sequence[Finished], n: int) -> Usage:
    """Of all replies; each prompt counts once."""
    told = usage_of([end.receipt for end in ends])
    own = sorted(ends, key=lambda end: end.index)[::n]
    told.prompt_tokens = sum(len(end.work.tokens) for end in own)
    told.prompt_tokens_details.cached_tokens = sum(end.receipt.cached for end in own)
    told.total_tokens = told.prompt_tokens + told.completion_tokens
    return told


async def _stream(
    exchange: Exchange, asked: CompletionRequest, head: dict[str, Any], works: list[Continuation]
) -> web.StreamResponse:
    events, engine = exchange.stream(), exchange.state.engine
    if asked.echo and asked.logprobs is not None:
        raise UnsupportedError("echo", True, "with logprobs, not in a stream")
    replies = [_Reply(engine.tokenizer, asked, work) for work in works]
    ends: list[Finished] = []
    begun: set[int] = set()
    async with aclosing(stream(engine, works, exchange.state.metrics.generated)) as pieces:
        async for piece in pieces:
            own = replies[piece.index]
            text = own.head(())[0] if piece.index not in begun else ""
            begun.add(piece.index)
            more: dict[str, Any] = {}
            if isinstance(piece, Piece):
                choice = TextChoice(piece.index, text + piece.text, None, own.logprobs(piece.logprobs))
            else:
                choice = TextChoice(piece.index, text, piece.reason)
                ends.append(piece)
                more["sglext"] = extension(asked, piece.receipt.cached)
            await events.send(Completion(**head, choices=[choice], **more))
    if asked.stream_options is not None and asked.stream_options.include_usage:
        await events.send(Completion(**head, choices=[], usage=_usage(ends, asked.n or 1)))
    return await events.done(DONE)


ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        "openai",
        "Text behind text.",
        body=CompletionRequest,
        reply=Completion,
        events=Completion,
        size="large",
        gated=True,
        weigh=_weight,
    ),
)
