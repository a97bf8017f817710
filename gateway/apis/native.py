"""SGLang's own API, so that its `RuntimeEndpoint` and `bench_serving` run unchanged."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from weft.gateway.apis.common import lease_for, namespace_of, thinks
from weft.gateway.apis.native_report import tell_logprobs, whole_meta
from weft.gateway.apis.native_types import (
    AbortRequest,
    Generated,
    GenerateRequest,
    Meta,
    NativeSampling,
)
from weft.gateway.apis.texts import Texts
from weft.gateway.chat.continuation import Continuation, Finished, Piece, gather, stream
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.errors import HttpError
from weft.gateway.http.sse import DONE
from weft.gateway.http.state import State
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError, UnsupportedError

_MOST = 256  # generations of a request
_UNSERVED = ("image_data", "audio_data", "video_data", "input_embeds", "lora_path")


class Running:
    """Requests under way, by the ids that their clients gave them."""

    def __init__(self, state: State) -> None:
        self.texts = Texts(state.engine.tokenizer)
        self.tasks: dict[tuple[str, str], set[asyncio.Task[object]]] = {}


@dataclass(frozen=True)
class _Work:
    """One of a request's prompts."""

    prompt: str | None
    asked: NativeSampling
    tokens: list[int]


async def generate(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: GenerateRequest = exchange.body
    _refuse(asked)
    namespace = namespace_of(exchange.caller, asked.cache_salt or asked.extra_key)
    running = exchange.state.part(Running)
    works = await _works(exchange, asked, namespace)
    own = [_continuations(exchange, asked, work, namespace, place) for place, work in enumerate(works)]
    flat = [continuation for group in own for continuation in group]
    for continuation in flat:
        continuation.check(exchange.state.engine)
    if len(flat) > _MOST:
        raise RequestError("text", len(flat), f"at most {_MOST} generations in all")
    ids = _ids(asked, len(flat))
    task = asyncio.current_task()
    assert task is not None
    for id in ids:
        running.tasks.setdefault((exchange.caller.key, id), set()).add(task)
    try:
        if asked.stream:
            return await _stream(exchange, asked, flat, ids, works, namespace)
        ends = await gather(exchange.state.engine, flat, exchange.state.metrics.generated)
        found = [_generated(exchange, asked, end, ids[end.index]) for end in ends]
        _remember(running, namespace, works, ends, len(flat) // max(1, len(works)))
        single = not _is_batch(asked) and len(flat) == 1
        return Answer(found[0] if single else found)
    except asyncio.CancelledError:
        if any((exchange.caller.key, id) in running.tasks for id in ids) or task.cancelling() == 0:
            raise
        task.uncancel()
        raise HttpError(409, "aborted by /abort_request", code="aborted") from None
    finally:
        for id in ids:
            tasks = running.tasks.get((exchange.caller.key, id))
            if tasks is not None:
                tasks.discard(task)
                if not tasks:
                    del running.tasks[exchange.caller.key, id]


def _refuse(asked: GenerateRequest) -> None:
    if asked.custom_logit_processor is not None:
        raise UnsupportedError("custom_logit_processor", "…", "it is code, and none of a client's is run here")
    for name in _UNSERVED:
        if getattr(asked, name):
            raise UnsupportedError(name, "…", "DeepSeek-V4 reads text only" if "data" in name else "not served")
    if asked.return_hidden_states:
        raise UnsupportedError("return_hidden_states", True, "not served")
    if (asked.text is None) == (asked.input_ids is None):
        raise RequestError("text", asked.text and "…", "give either text or input_ids")


def _is_batch(asked: GenerateRequest) -> bool:
    if asked.text is not None:
        return isinstance(asked.text, list)
    return isinstance((asked.input_ids or [0])[0], list)


def _weight(asked: GenerateRequest) -> int:
    prompts = len(asked.text or asked.input_ids or ()) if _is_batch(asked) else 1
    params = asked.sampling_params
    if isinstance(params, list):
        return max(1, sum(own.n or 1 for own in params))
    return max(1, prompts) * ((params.n if params is not None else None) or 1)


async def _works(exchange: Exchange, asked: GenerateRequest, namespace: str) -> list[_Work]:
    engine, texts = exchange.state.engine, exchange.state.part(Running).texts
    if asked.text is not None:
        prompts: Sequence[str | None] = asked.text if isinstance(asked.text, list) else [asked.text]
        tokens = [await texts.tokens(namespace, text or "") for text in prompts]
    else:
        given: list[Any] = asked.input_ids if _is_batch(asked) else [asked.input_ids]  # type: ignore[assignment]
        for i, ids in enumerate(given):
            if not isinstance(ids, list):
                raise RequestError(f"input_ids[{i}]", ids, "must be a list, as the first one is")
        tokens = [engine.tokens(ids) for ids in given]
        prompts = [None] * len(tokens)
    if not tokens:
        raise RequestError("text", [], "must not be empty")
    for own in tokens:
        if not own:
            raise RequestError("input_ids", [], "must not be empty")
    params = asked.sampling_params
    many = params if isinstance(params, list) else [params or NativeSampling()] * len(tokens)
    if len(many) != len(tokens):
        raise RequestError("sampling_params", len(many), f"there are {len(tokens)} prompts")
    return [_Work(*own) for own in zip(prompts, many, tokens, strict=True)]


def _continuations(
    exchange: Exchange, asked: GenerateRequest, work: _Work, namespace: str, place: int
) -> list[Continuation]:
    params = _params(asked, work.asked, thinks(work.prompt))
    seed = random.getrandbits(63) if params.seed is None else params.seed
    start = asked.logprob_start_len
    scored = None
    if asked.return_logprob and start is not None and start >= 0:
        # One that draws nothing is a `select`, which reckons with those behind that token.
        scored = start if params.max_tokens else start + 1
    elif asked.return_logprob and not params.max_tokens and start is None:
        scored = 0
    session = asked.session_id or (asked.session_params or {}).get("id")
    lease = lease_for(exchange, asked.cache_salt or asked.extra_key, asked.kv_hints, session)
    return [
        Continuation(
            work.tokens,
            msgspec.structs.replace(params, seed=(seed + i) % (1 << 63)),
            namespace,
            scored,
            lease if place == i == 0 and params.max_tokens else None,
            "text" if work.prompt is not None else "input_ids",
        )
        for i in range(work.asked.n or 1)
    ]


def _params(asked: GenerateRequest, own: NativeSampling, thinking: bool) -> SamplingParams:
    for name in ("structural_tag", "custom_params", "ebnf"):
        if getattr(own, name) is not None:
            raise UnsupportedError(f"sampling_params.{name}", "…", "use regex or json_schema")
    if own.regex is not None and own.json_schema is not None:
        raise RequestError("sampling_params.regex", own.regex, "cannot be combined with json_schema")
    grammar = Grammar("regex", own.regex, thinking) if own.regex is not None else None
    if own.json_schema is not None:
        grammar = Grammar("json_schema", own.json_schema, thinking)
    for token in own.logit_bias or ():
        if not (token.isascii() and token.isdigit() and len(token) < 16):
            raise RequestError("sampling_params.logit_bias", token, "keys are token ids")
    given: dict[str, Any] = {
        "max_tokens": own.max_new_tokens,
        "min_tokens": own.min_new_tokens,
        "temperature": own.temperature,
        "top_p": own.top_p,
        "top_k": own.top_k,
        "min_p": own.min_p,
        "frequency_penalty": own.frequency_penalty,
        "presence_penalty": own.presence_penalty,
        "repetition_penalty": own.repetition_penalty,
        "stop": _texts(own.stop),
        "stop_token_ids": tuple(own.stop_token_ids or ()),
        "stop_regex": _texts(own.stop_regex),
        "ignore_eos": own.ignore_eos,
        "seed": own.sampling_seed,
        "logit_bias": {int(token): bias for token, bias in (own.logit_bias or {}).items()},
        "grammar": grammar,
        "logprobs": (asked.top_logprobs_num or 0) if asked.return_logprob else None,
    }
    return SamplingParams(**{key: value for key, value in given.items() if value is not None}).validate()


def _texts(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _ids(asked: GenerateRequest, count: int) -> list[str]:
    if isinstance(asked.rid, list):
        if len(asked.rid) != count:
            raise RequestError("rid", len(asked.rid), f"there are {count} generations")
        return asked.rid
    first = asked.rid or secrets.token_hex(16)
    return [first if i == 0 else f"{first}_{i}" for i in range(count)]


def _remember(running: Running, namespace: str, works: list[_Work], ends: Sequence[Finished], n: int) -> None:
    """So that a text which goes on from here has the tokens that were drawn."""
    for end in ends:
        prompt = works[end.index // n].prompt
        if prompt is not None and end.tokens:
            running.texts.drawn(namespace, prompt, end.work.tokens, end.text, end.tokens[: end.kept])


def _generated(exchange: Exchange, asked: GenerateRequest, end: Finished, id: str) -> Generated:
    return Generated(
        text=end.text,
        meta_info=whole_meta(exchange.state.engine.tokenizer, asked, end, id),
        output_ids=list(end.tokens[: end.kept]),
    )


async def _stream(
    exchange: Exchange,
    asked: GenerateRequest,
    flat: list[Continuation],
    ids: list[str],
    works: list[_Work],
    namespace: str,
) -> web.StreamResponse:
    events, state = exchange.stream(), exchange.state
    texts: list[list[str]] = [[] for _ in flat]
    drawn = [0] * len(flat)
    logprobs: list[list[m.Logprob]] = [[] for _ in flat]
    several = len(flat) > 1 or _is_batch(asked)
    async with aclosing(stream(state.engine, flat, state.metrics.generated)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Piece):
                texts[piece.index].append(piece.text)
                drawn[piece.index] += len(piece.tokens)
                logprobs[piece.index] += piece.logprobs
                whole = "".join(texts[piece.index])
                texts[piece.index] = [whole]
                meta = Meta(
                    id=ids[piece.index],
                    prompt_tokens=len(flat[piece.index].tokens),
                    completion_tokens=drawn[piece.index],
                )
                tell_logprobs(meta, state.engine.tokenizer, asked, logprobs[piece.index])
                told = Generated(text=whole, meta_info=meta)
            else:
                told = _generated(exchange, asked, piece, ids[piece.index])
                _remember(state.part(Running), namespace, works, [piece], len(flat) // len(works))
            if several:
                told.index = piece.index
            await events.send(told)
    return await events.done(DONE)


async def abort(exchange: Exchange) -> Answer:
    """Ends requests of the caller's by their id; an admin's `abort_all` ends all."""
    asked: AbortRequest = exchange.body
    running = exchange.state.part(Running)
    if asked.abort_all and exchange.caller.role != "admin":
        raise HttpError(403, "abort_all needs an admin's key", code="not_an_admin")
    if not asked.rid and not asked.abort_all:
        raise RequestError("rid", "", "name a request, or abort_all")
    for key, tasks in list(running.tasks.items()):
        if asked.abort_all or key == (exchange.caller.key, asked.rid):
            del running.tasks[key]
            for task in tasks:
                task.cancel()
    return Answer("", content_type="text/plain")


ROUTES = (
    Route(
        "POST",
        "/generate",
        generate,
        "sglang",
        "Tokens behind a text or tokens, or their log-probabilities.",
        body=GenerateRequest,
        reply=Generated | list[Generated],
        events=Generated,
        size="large",
        gated=True,
        weigh=_weight,
        statuses=(409,),
    ),
    Route(
        "POST", "/abort_request", abort, "sglang", "End requests.",
        body=AbortRequest, reply=str, statuses=(403,), size="small",
    ),
)  # fmt: skip
