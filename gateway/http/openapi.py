"""The OpenAPI 3.1 document, from the routes and their msgspec types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from weft.gateway.http.base import Route
from weft.gateway.http.errors import ERROR_TYPES

_REF = "#/components/schemas/{name}"
_REASONS = {
    400: "A field is wrong; the message names it.",
    401: "No key, or an unknown one.",
    403: "Not with this key.",
    404: "There is no such thing.",
    405: "Another method is served here.",
    409: "It has ended.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "This key has too much under way; see Retry-After.",
    503: "The server starts, ends, or has too much to do; see Retry-After.",
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    kinds = _kinds(routes)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    known = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(re.sub(r":[^}]*}", "}", route.path), {})[route.method.lower()] = _operation(route, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Weft",
            "version": weft_version(),
            "description": "DeepSeek-V4 behind OpenAI's, Anthropic's and SGLang's APIs, and programs over HTTP.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def weft_version() -> str:
    try:
        return version("weft")
    except PackageNotFoundError:  # run from its folder
        return "unknown"


def _kinds(routes: Sequence[Route]) -> list[Any]:
    kinds: list[Any] = [kind for route in routes for kind in (route.body, route.reply, route.events)]
    kinds = [kind for kind in (*kinds, *ERROR_TYPES.values()) if kind is not None]
    return list({repr(kind): kind for kind in kinds}.values())


def _operation(route: Route, known: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.about,
        "operationId": f"{route.method.lower()}_{re.sub('[^a-z0-9]+', '_', route.path.lower()).strip('_')}",
        "responses": _responses(route, known),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", route.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.optional_body,
            "content": {"application/json": {"schema": known[repr(route.body)]}},
        }
    if route.access != "open":
        operation["security"] = [{"bearer": []}, {"key": []}, {}]
    return operation


def _responses(route: Route, known: dict[str, Any]) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done."}
    content = {}
    if route.reply is not None:
        kind = "text/plain" if route.reply is str else "application/json"
        content[kind] = {"schema": known[repr(route.reply)]}
    if route.events is not None:
        # OpenAPI has no word for the type of events before 3.2.
        content["text/event-stream"] = {"schema": {}, "x-event-data": known[repr(route.events)]}
    if content:
        good["content"] = content
    shape = {"application/json": {"schema": known[repr(ERROR_TYPES[route.shape])]}}
    refused = {str(status): {"description": _REASONS[status], "content": shape} for status in _statuses(route)}
    return {"200": good, **refused}


def _statuses(route: Route) -> list[int]:
    statuses = {405, *route.statuses}
    if route.access != "open":
        statuses |= {401, 403}
    if not route.early:
        statuses.add(503)
    if route.body is not None or route.query:
        statuses.add(400)
    if route.body is not None:
        statuses |= {413, 415}
    if route.gated:
        statuses |= {404, 429}
    return sorted(statuses)
