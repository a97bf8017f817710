"""Functions that programs and models call: declared from their signatures, checked, timed, run outside the loop.

@tool(timeout=5, idempotent=True, retry=Retry(attempts=3))
def weather(city: str, day: Literal["today", "tomorrow"] = "today") -> str:
    '''What the weather is like.'''
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import msgspec

from weft.backend.executor.outside import Outside
from weft.runtime.errors import ConfigError, WeftError

_SECONDS = 30.0


class ToolError(WeftError):
    """A call of a tool failed, after so many attempts. `__cause__` is the last failure; TimeoutError if it was
    late."""

    def __init__(self, tool: str, arguments: Mapping[str, Any], reason: str, attempts: int = 1) -> None:
        super().__init__(f"{tool}: {reason}")
        self.tool, self.arguments, self.reason, self.attempts = tool, dict(arguments), reason, attempts


@dataclass(frozen=True)
class Retry:
    """attempts: in all. wait: seconds before the second one, twice as long before each further one. on: failures
    after which to try again; being late is a TimeoutError."""

    attempts: int = 1
    wait: float = 0.1
    on: tuple[type[Exception], ...] = (Exception,)


class Tool:
    """A function with a name, a schema and a policy. Calling it calls the function."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        description: str,
        parameters: dict[str, Any],
        check: Callable[[Mapping[str, Any]], dict[str, Any]],
        timeout: float = _SECONDS,
        retry: Retry | None = None,
        idempotent: bool = False,
        strict: bool = False,
        here: bool = False,
    ) -> None:
        """parameters: a JSON schema. check: arguments as the function takes them, or an exception that says what
        is wrong. timeout: seconds for each attempt. strict: what a model writes is held to the whole schema, or
        what cannot be held to is refused. here: an `async def` that must run on the loop it is called from."""
        retry = retry or Retry()
        if not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
            raise ConfigError("timeout", timeout, f"{name}: must be a number of seconds")
        if retry.attempts < 1:
            raise ConfigError("retry", retry, f"{name}: must make one attempt at least")
        if retry.attempts > 1 and not idempotent:
            raise ConfigError("retry", retry, f"{name}: only what is idempotent may be tried again")
        self.function, self.name, self.description, self.parameters = function, name, description, parameters
        self.timeout, self.retry, self.idempotent, self.strict = timeout, retry, idempotent, strict
        self._check, self._here = check, here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def declared(self) -> dict[str, Any]:
        """As Chat Completions declares tools."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = self.parameters
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": function}

    @property
    def patience(self) -> float:
        """Seconds that a call takes at most, all attempts together."""
        waits = self.retry.wait * (math.pow(2, self.retry.attempts - 1) - 1)
        return self.timeout * self.retry.attempts + waits

    async def run(
        self, arguments: Mapping[str, Any], outside: Outside, context: contextvars.Context | None = None
    ) -> Any:
        """What the function returns. Raises `ToolError`."""
        context = context or contextvars.copy_context()
        try:
            checked = self._check(arguments)
        except Exception as error:
            raise ToolError(self.name, arguments, f"wrong arguments: {error}", 0) from error
        wait = self.retry.wait
        for attempt in range(1, self.retry.attempts + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._once(checked, outside, context)
            except Exception as error:
                if attempt == self.retry.attempts or not isinstance(error, self.retry.on):
                    late = f"no result after {self.timeout:g} s"
                    reason = late if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
                    raise ToolError(self.name, arguments, reason, attempt) from error
            await asyncio.sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, arguments: dict[str, Any], outside: Outside, context: contextvars.Context) -> Any:
        function = partial(self.function, **arguments)
        if self._here:
            return await function()
        if inspect.iscoroutinefunction(self.function):
            return await outside.coroutine(function, context)
        return await outside.call("tool", function, context.copy())


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float = _SECONDS,
    retry: Retry | None = None,
    idempotent: bool = False,
    strict: bool = False,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function, or an `async def`, a tool. Its parameters need annotations; its docstring is what a model
    is told, `typing.Annotated[int, msgspec.Meta(description=...)]` tells of a parameter.

    timeout: seconds for each attempt. idempotent: calling it again does no harm, so it may be retried. Sync
    functions run in threads, others on an event loop of their own. strict: see `Tool`."""
    if function is None:
        return partial(_declare, **options)
    return _declare(function, **options)


def _declare(function: Callable[..., Any], **options: Any) -> Tool:
    name = options.pop("name", None) or function.__name__
    description = options.pop("description", None) or inspect.getdoc(function) or ""
    fields: list[Any] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.annotation is parameter.empty or parameter.kind not in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            raise ConfigError(parameter.name, function, f"{name}: needs an annotation, and must have a name")
        default = () if parameter.default is parameter.empty else (parameter.default,)
        fields.append((parameter.name, parameter.annotation, *default))
    arguments = msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True)

    def check(given: Mapping[str, Any]) -> dict[str, Any]:
        converted = msgspec.convert(dict(given), arguments)
        return {own: getattr(converted, own) for own in arguments.__struct_fields__}

    return Tool(
        function, name=name, description=description, parameters=_schema(arguments), check=check, **options
    )


def _schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    """A JSON schema without the references that msgspec makes for the struct itself."""
    (_,), parts = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own: dict[str, Any] = parts.pop(arguments.__name__)
    schema = {"type": "object", "properties": own["properties"], "required": own["required"]}
    return schema | {"additionalProperties": False} | ({"$defs": parts} if parts else {})


def as_text(tool: str, result: Any) -> str:
    """What a model reads of a tool's result: text as it is, anything else as JSON."""
    try:
        return result if isinstance(result, str) else msgspec.json.encode(result).decode()
    except (TypeError, ValueError, OverflowError) as error:
        raise ToolError(tool, {}, f"its result is no JSON: {error}") from error
