"""The contract between the server and its handlers.

A handler is a coroutine of an `Exchange`; it returns an `Answer`, or streams by `Exchange.stream` and returns what
that gives. It raises exceptions of `weft.runtime.errors` or `HttpError`, and the server puts them in the API's own
shape. When the client leaves, the handler is cancelled, wherever it waits; what it holds it gives back on the way
out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from aiohttp import web

from weft.gateway.http.errors import HttpError, Shape, not_json
from weft.gateway.http.keys import Caller
from weft.gateway.http.sse import EventStream

if TYPE_CHECKING:
    from weft.gateway.http.state import State

Access = Literal["open", "user", "admin"]
Size = Literal["none", "small", "large"]  # of a body


@dataclass(frozen=True)
class Answer:
    """body: a struct, or text. headers: more of them."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    def encoded(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else msgspec.json.encode(self.body)


Handler = Callable[["Exchange"], Awaitable[Answer | web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """One line of the server's table, and of its OpenAPI document.

    body, reply: types of the JSON; events: of a stream's data, if it can stream. size: how large a body may be.
    early: served while the model loads, and while the server drains. gated: counts against the queue; weigh: of
    its body, how many generations it asks for at one time.
    statuses: of errors that come beside those every route of its kind has. query: parameters, by name.
    """

    method: Literal["GET", "POST", "DELETE", "PUT"]
    path: str
    handler: Handler
    shape: Shape
    about: str
    body: Any = None
    reply: Any = None
    events: Any = None
    size: Size = "none"
    access: Access = "user"
    early: bool = False
    gated: bool = False
    weigh: Callable[[Any], int] = lambda body: 1
    statuses: tuple[int, ...] = ()
    query: dict[str, Any] = field(default_factory=dict)
    optional_body: bool = False


class Exchange:
    """One request, while it is served. id: told the client, and in the log."""

    def __init__(self, request: web.Request, route: Route, state: State, caller: Caller, id: str) -> None:
        self.request, self.route, self.state, self.caller, self.id = request, route, state, caller, id
        self.body: Any = None
        self.started: EventStream | None = None

    @property
    def bounds(self) -> Any:
        return self.state.config.bounds

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def header(self, name: str) -> str | None:
        return self.request.headers.get(name)

    def whole_number(self, name: str, default: int) -> int:
        """Of the query, not negative."""
        text = self.request.query.get(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise HttpError(400, f"{name} = {text!r}: must be a whole number", code="invalid_value", field=name)
        return int(text)

    def flag(self, name: str) -> bool:
        text = self.request.query.get(name)
        if text not in (None, "true", "false"):
            raise HttpError(400, f"{name} = {text!r}: must be true or false", code="invalid_value", field=name)
        return text == "true"

    def stream(self, beat: bytes = b": keepalive\n\n") -> EventStream:
        """Events to the client. Its head goes out with the first of them: what fails before has a status."""
        self.started = EventStream(self.request, self.bounds.keepalive, self.bounds.slow, beat, self.headers())
        return self.started

    def headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.id}
        if self.route.shape == "anthropic":
            headers["request-id"] = self.id
        return headers

    async def read(self) -> None:
        """Take the body in, within its bounds, as the route's type."""
        limit = self.bounds.body if self.route.size == "large" else self.bounds.small
        raw = await _bytes(self.request, limit)
        if not raw.strip() and self.route.optional_body:
            return
        if self.request.content_type != "application/json":
            reason = f"content-type {self.request.content_type!r}: send application/json"
            raise HttpError(415, reason, code="unsupported_media_type")
        try:
            self.body = decoder(self.route.body).decode(raw)
        except msgspec.DecodeError as error:
            raise not_json(error) from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}


def decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    if kind not in _DECODERS:
        _DECODERS[kind] = msgspec.json.Decoder(kind)
    return _DECODERS[kind]


async def _bytes(request: web.Request, limit: int) -> bytes:
    """The body; 413 as soon as it is known to be longer, packed or not."""
    if (request.content_length or 0) > limit:
        raise HttpError(413, f"a body of {request.content_length} bytes; at most {limit}", code="too_large")
    parts, size = [], 0
    try:
        async for part in request.content.iter_any():
            size += len(part)
            if size > limit:
                raise HttpError(413, f"a body of more than {limit} bytes", code="too_large")
            parts.append(part)
    except web.RequestPayloadError as error:
        raise HttpError(400, f"the body cannot be read: {error}", code="invalid_body") from None
    return b"".join(parts)
