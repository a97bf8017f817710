"""From exceptions to statuses, and to the error body of each API.

Statuses: 400 a field is wrong, 401 no key, 403 not this key's, 404 no such thing, 405, 409 it has ended, 413 too
large, 415 no JSON, 429 this caller has too much under way, 503 the server has, or starts, or ends; 500 is a bug of
ours.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from weft.runtime import errors

Shape = Literal["openai", "anthropic", "sglang", "weft"]
_log = logging.getLogger("weft.gateway")
_SHOWN = 200  # characters of a value


class HttpError(errors.WeftError):
    """A refusal that has a status of its own. retry_after: seconds; code: for programs to read."""

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        code: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.reason, self.code, self.field = status, reason, code, field
        self.retry_after = retry_after


class OpenAIErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(msgspec.Struct):
    error: OpenAIErrorDetail


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    error: AnthropicErrorDetail
    request_id: str | None = None
    type: Literal["error"] = "error"


class NativeErrorDetail(msgspec.Struct):
    """field, value: what is wrong, if it is one; long values are cut."""

    message: str
    type: str
    field: str | None = None
    value: str | float | int | bool | None = None


class NativeError(msgspec.Struct):
    """Of Weft's own API and of SGLang's, whose clients show whatever they get."""

    error: NativeErrorDetail


ERROR_TYPES: dict[Shape, type[msgspec.Struct]] = {
    "openai": OpenAIError,
    "anthropic": AnthropicError,
    "sglang": NativeError,
    "weft": NativeError,
}


@dataclass(frozen=True)
class Fault:
    """An exception as HTTP tells of it."""

    status: int
    message: str
    code: str | None = None
    field: str | None = None
    retry_after: float | None = None
    value: object = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def fault(error: BaseException) -> Fault:
    """What to say of an exception; logs those that are bugs."""
    match error:
        case HttpError():
            return Fault(error.status, error.reason, error.code, error.field, error.retry_after)
        case errors.ContextLengthError():
            return Fault(400, _text(error), "context_length_exceeded", error.field, value=error.value)
        case errors.UnsupportedError():
            return Fault(400, _text(error), "unsupported", error.field, value=error.value)
        case errors.RequestError():
            return Fault(400, _text(error), "invalid_value", error.field, value=error.value)
        case errors.Overloaded():
            return Fault(503, str(error), "overloaded", retry_after=error.retry_after)
        case errors.EngineDead():
            return Fault(503, str(error), "engine_dead", retry_after=5.0)
        case errors.Cancelled():
            return Fault(409, str(error), "cancelled")
        case errors.DeadlineExceeded() | errors.BudgetExceeded():
            return Fault(400, str(error), "limit_exceeded")
    _log.error("a request failed", exc_info=error)
    return Fault(500, "internal error; the server's log says more", "internal_error")


def _text(error: errors.RequestError) -> str:
    shown = repr(error.value)
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "…"
    text = f"{error.field} = {shown}: {error.reason}"
    return text.encode(errors="replace").decode()


_OPENAI = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def body(shape: Shape, told: Fault, request_id: str | None = None) -> msgspec.Struct:
    """The error body of an API."""
    match shape:
        case "openai":
            kind = _OPENAI.get(told.status, "invalid_request_error")
            return OpenAIError(OpenAIErrorDetail(told.message, kind, told.field, told.code))
        case "anthropic":
            kind = _ANTHROPIC.get(told.status, "invalid_request_error")
            return AnthropicError(AnthropicErrorDetail(kind, told.message), request_id)
    return NativeError(NativeErrorDetail(told.message, told.code or "error", told.field, _plain(told.value)))


def _plain(value: object) -> str | float | int | bool | None:
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 53):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text[:_SHOWN].encode(errors="replace").decode()


def not_json(error: msgspec.DecodeError) -> HttpError:
    """A body that is no JSON, or not of its type: says where."""
    reason = str(error)
    if isinstance(error, msgspec.ValidationError):
        reason, _, path = reason.partition(" - at `$")
        field = path.removesuffix("`").lstrip(".") or None
        return HttpError(400, f"{field}: {reason}" if field else reason, code="invalid_type", field=field)
    return HttpError(400, f"the body is not JSON: {reason}", code="invalid_json")
