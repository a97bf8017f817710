"""How the server is: for load balancers, for people, for Prometheus. And what it serves, as OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.errors import HttpError
from weft.gateway.http.openapi import document
from weft.gateway.http.state import State
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import DeadlineExceeded, EngineDead

_PATIENCE = 60.0  # seconds


class Health(msgspec.Struct):
    """status: of the process, which answers as long as its core can. stage: of its start and its end."""

    status: Literal["ok", "failed"]
    stage: str
    progress: str = ""


async def health(exchange: Exchange) -> Answer:
    state = exchange.state
    if state.failure is not None or (state.known_engine is not None and state.known_engine.dead):
        return Answer(Health("failed", state.stage, type(state.failure or EngineDead()).__name__), 503)
    return Answer(Health("ok", state.stage, state.progress))


async def ready(exchange: Exchange) -> Answer:
    state = exchange.state
    good = state.stage == "ready" and not (state.known_engine and state.known_engine.dead)
    headers = {} if good else {"Retry-After": "1"}
    return Answer(Health("ok", state.stage, state.progress), 200 if good else 503, headers)


async def generates(exchange: Exchange) -> Answer:
    """Draws one token."""
    engine = exchange.state.engine
    try:
        await engine.generate([engine.tokenizer.bos], SamplingParams(max_tokens=1), deadline=_PATIENCE)
    except DeadlineExceeded:
        reason = f"no token within {_PATIENCE:g} s"
        raise HttpError(503, reason, code="overloaded", retry_after=exchange.state.gate.patience()) from None
    return Answer(Health("ok", exchange.state.stage))


async def metrics(exchange: Exchange) -> Answer:
    await exchange.state.look()
    raw, kind = exchange.state.metrics.text()
    return Answer(raw.decode(), content_type=kind)


async def openapi(exchange: Exchange) -> Answer:
    return Answer(exchange.state.part(_written))


def _written(state: State) -> str:
    """The document: the same for all, and long in the making."""
    return msgspec.json.encode(document(state.routes)).decode()


ROUTES = (
    Route(
        "GET", "/health", health, "weft", "Whether the process lives.",
        reply=Health, access="open", early=True, statuses=(503,),
    ),
    Route(
        "GET", "/ready", ready, "weft", "Whether requests are served now.",
        reply=Health, access="open", early=True, statuses=(503,),
    ),
    Route("GET", "/health_generate", generates, "weft", "Draws one token.", reply=Health),
    Route("GET", "/metrics", metrics, "weft", "Figures, in Prometheus' format.", reply=str, early=True),
    Route(
        "GET", "/openapi.json", openapi, "weft", "This document.",
        reply=dict[str, Any], access="open", early=True,
    ),
)  # fmt: skip
