"""What SGLang's clients ask of a server beside generations."""

from __future__ import annotations

from weft.gateway.apis.native_types import (
    Detokenized,
    DetokenizeRequest,
    ModelInfo,
    Prefixes,
    ServerInfo,
    Tokenized,
    TokenizeRequest,
)
from weft.gateway.chat.encoding import tokens_of
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.errors import HttpError
from weft.gateway.http.openapi import weft_version


async def model_info(exchange: Exchange) -> Answer:
    engine, name = exchange.state.engine, exchange.state.config.names[0]
    config = engine.model_config
    return Answer(
        ModelInfo(
            model_path=name, tokenizer_path=name, model_type=config.model_type, context_length=engine.context
        )
    )


async def server_info(exchange: Exchange) -> Answer:
    engine, name = exchange.state.engine, exchange.state.config.names[0]
    stats = await engine.stats()
    return Answer(
        ServerInfo(
            model_path=name,
            model_type=engine.model_config.model_type,
            served_model_name=name,
            version=weft_version(),
            context_length=engine.context,
            num_hidden_layers=engine.model_config.num_hidden_layers,
            kv_bytes=engine.capacity.total,
            max_running_requests=engine.slots,
            internal_states=[{"calls": stats.calls, "slots": stats.slots, "kv_usage": stats.usage}],
        )
    )


async def flush(exchange: Exchange) -> Answer:
    """Forget the KV of what is not open, of every namespace. Results stay the same."""
    exchange.state.sessions.clear()
    exchange.state.engine.flush()
    return Answer("Cache flushed.\n", content_type="text/plain")


async def profile(exchange: Exchange) -> Answer:
    """Nothing to start or stop: /metrics and receipts always tell."""
    return Answer("Figures are at /metrics.\n", content_type="text/plain")


async def concatenate(exchange: Exchange) -> Answer:
    """KV computed in other contexts would not be that of the joined text, and requests have no ids to find it
    by."""
    reason = 'join(mode="concate_and_append") cannot be done over HTTP; run the program on the server'
    raise HttpError(400, reason, code="unsupported")


async def tokenize(exchange: Exchange) -> Answer:
    asked: TokenizeRequest = exchange.body
    engine = exchange.state.engine
    tokens = await tokens_of(engine.tokenizer, "prompt", asked.prompt)
    if asked.add_special_tokens and tokens[:1] != [engine.tokenizer.bos]:
        tokens.insert(0, engine.tokenizer.bos)
    return Answer(Tokenized(tokens, len(tokens), engine.context))


async def detokenize(exchange: Exchange) -> Answer:
    asked: DetokenizeRequest = exchange.body
    engine = exchange.state.engine
    return Answer(Detokenized(engine.tokenizer.decode(engine.tokens(asked.tokens))))


_INFO, _SERVER = "The model.", "The server and how full it is."
_FLUSH = "Forget the KV of what is not open."
ROUTES = (
    Route("GET", "/get_model_info", model_info, "sglang", _INFO, reply=ModelInfo),
    Route("GET", "/model_info", model_info, "sglang", _INFO, reply=ModelInfo),
    Route("GET", "/get_server_info", server_info, "sglang", _SERVER, reply=ServerInfo),
    Route("GET", "/server_info", server_info, "sglang", _SERVER, reply=ServerInfo),
    Route("POST", "/flush_cache", flush, "sglang", _FLUSH, reply=str, access="admin"),
    Route("GET", "/flush_cache", flush, "sglang", _FLUSH, reply=str, access="admin"),
    Route("POST", "/reset_prefix_cache", flush, "sglang", _FLUSH, reply=str, access="admin"),
    *(
        Route(method, f"/{verb}_profile", profile, "sglang", "There is nothing to profile.", reply=str)
        for verb in ("start", "stop")
        for method in ("GET", "POST")
    ),
    Route(
        "POST", "/concate_and_append_request", concatenate, "sglang", "Not over HTTP.",
        body=Prefixes,
    ),
    Route(
        "POST", "/tokenize", tokenize, "sglang", "A text's tokens.",
        body=TokenizeRequest, reply=Tokenized, size="large",
    ),
    Route(
        "POST", "/detokenize", detokenize, "sglang", "The text of tokens.",
        body=DetokenizeRequest, reply=Detokenized, size="large",
    ),
)  # fmt: skip
