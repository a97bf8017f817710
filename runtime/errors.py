"""Exceptions that Weft raises for its caller's mistakes and the world's; our own bugs are asserts.

WeftError
├── ConfigError          a config field is missing, unknown or has an impossible value
├── CheckpointError      a checkpoint is incomplete, misshaped or unreadable
├── RequestError         a request's parameter is invalid (names field and value)
│   ├── UnsupportedError     valid elsewhere, not served by this version
│   └── ContextLengthError   prompt and output do not fit the context
├── Overloaded           the bounded queue or the state pools are full; try again
├── DeadlineExceeded     the call's deadline passed before it finished
├── BudgetExceeded       a program spent the tokens or the money it was given
├── Cancelled            the caller cancelled the call, or closed its sequence
└── EngineDead           the engine core stopped; every waiting call gets this
"""

from __future__ import annotations


class WeftError(Exception):
    """Base of every exception Weft raises on purpose."""


class ConfigError(WeftError, ValueError):
    """A model or engine config value is impossible; `field` and `value` say which."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field} = {value!r}: {reason}")
        self.field = field
        self.value = value


class CheckpointError(WeftError):
    """A checkpoint cannot be read; the message lists every problem found at once."""


class RequestError(WeftError, ValueError):
    """A request parameter is invalid; `field` and `value` say which."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field} = {value!r}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason


class UnsupportedError(RequestError):
    """The feature exists in the field's vocabulary, but this version does not serve it."""


class ContextLengthError(RequestError):
    """Prompt plus requested output exceed the model's or the engine's context."""


class Overloaded(WeftError):
    """Queue or state pools are full. `retry_after` is a hint in seconds."""

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BudgetExceeded(WeftError):
    """A program spent what it was given. limit: its name; value: how much that was."""

    def __init__(self, limit: str, value: float, reason: str) -> None:
        super().__init__(f"{limit} = {value!r}: {reason}")
        self.limit = limit
        self.value = value


class Cancelled(WeftError):
    """The call was cancelled, or its sequence was closed, before it finished."""


class DeadlineExceeded(WeftError):
    """The call's deadline passed before it finished."""


class EngineDead(WeftError):
    """The engine core has stopped, with the state of the sequences it held."""
