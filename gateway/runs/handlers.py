"""Programs and runs over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web
from sglang.lang.ir import SglFunction

from weft.gateway.apis.common import namespace_of
from weft.gateway.http.base import Answer, Exchange, Route
from weft.gateway.http.errors import HttpError
from weft.gateway.runs.explain import explain, explanation
from weft.gateway.runs.inline import made_of
from weft.gateway.runs.inline_types import Inline
from weft.gateway.runs.registry import Program
from weft.gateway.runs.runs import Kept, Runs
from weft.gateway.runs.types import (
    ExplainRequest,
    Explanation,
    InlineExplain,
    InlineRun,
    ProgramInfo,
    ProgramList,
    RunError,
    RunEvent,
    RunInfo,
    RunList,
    RunOptions,
    ToolInfo,
)


async def programs(exchange: Exchange) -> Answer:
    registry = exchange.state.part(Runs).registry
    tools = [
        ToolInfo(name=t.name, description=t.description, arguments=t.parameters) for t in registry.tools.values()
    ]
    return Answer(ProgramList([_info(own) for own in registry], tools))


async def program(exchange: Exchange) -> Answer:
    return Answer(_info(_find(exchange)))


def _find(exchange: Exchange) -> Program:
    name = exchange.path("name")
    found = exchange.state.part(Runs).registry.find(name)
    if found is None:
        raise HttpError(404, f"there is no program {name[:80]!r}", code="program_not_found", field="name")
    return found


def _info(own: Program) -> ProgramInfo:
    return ProgramInfo(name=own.name, tag=own.tag, hash=own.hash, description=own.about, arguments=own.schema)


async def run(exchange: Exchange) -> Answer | web.StreamResponse:
    own = _find(exchange)
    asked: RunOptions = exchange.body
    return await _run(exchange, own.name, own.tag, own.hash, own.program, own.read(asked.arguments), asked)


async def run_inline(exchange: Exchange) -> Answer | web.StreamResponse:
    asked: InlineRun = exchange.body
    made = made_of(asked.program, exchange.state.part(Runs).registry.tools)
    arguments = {"arguments": asked.arguments}
    return await _run(exchange, asked.program.name, "inline", _hash(asked.program), made, arguments, asked)


def _hash(inline: Inline) -> str:
    return hashlib.sha256(msgspec.json.encode(inline)).hexdigest()


async def _run(
    exchange: Exchange,
    name: str,
    tag: str,
    hash: str,
    made: SglFunction,
    arguments: Mapping[str, Any],
    asked: RunOptions,
) -> Answer | web.StreamResponse:
    runs = exchange.state.part(Runs)
    kept = runs.begin(exchange.caller, name, tag, hash, asked)
    work = runs.make(kept, made, arguments, asked, namespace_of(exchange.caller, asked.cache_salt))
    if asked.background:
        kept.task = exchange.state.go_on(_behind(exchange, kept, work))
        return await _events(exchange, kept, 0) if asked.stream else Answer(kept.info)
    kept.task = asyncio.get_running_loop().create_task(work)
    try:
        if asked.stream:
            return await _events(exchange, kept, 0)
        await asyncio.wait({kept.task})
        _refuse_unbegun(kept.task)
        return _answer(kept)
    finally:
        await kept.cancel()


async def _behind(exchange: Exchange, kept: Kept, work: Any) -> None:
    """In the background: it has a place in the queue beyond its request's. A refusal stands in the run."""
    try:
        with exchange.state.gate.enter(exchange.caller):
            await work
    except (asyncio.CancelledError, HttpError) as error:
        work.close()
        if not kept.ended:  # it was never begun
            cancelled = isinstance(error, asyncio.CancelledError)
            kept.info.status = "cancelled" if cancelled else "failed"
            kept.info.error = None if cancelled else RunError(type="Overloaded", message=str(error))
            kept.end()
        if isinstance(error, asyncio.CancelledError):
            raise


def _refuse_unbegun(task: asyncio.Task[Any]) -> None:
    """What was never begun has a status; what another request has cancelled ends as other runs do."""
    if not task.cancelled():
        task.result()


def _answer(kept: Kept) -> Answer:
    ran = kept.info.status == "failed" and kept.info.usage.tools
    return Answer(kept.info, headers={"x-should-retry": "false"} if ran else {})


async def _events(exchange: Exchange, kept: Kept, start: int) -> web.StreamResponse:
    stream = exchange.stream()
    async with aclosing(kept.follow(start)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.type == "ended" and kept.task is not None and not kept.background:
                await asyncio.wait({kept.task})
                _refuse_unbegun(kept.task)
            await stream.send(event, event=event.type, id=str(event.id))
    return await stream.done()


async def runs(exchange: Exchange) -> Answer:
    """The caller's, the latest first."""
    most = min(exchange.whole_number("limit", 20), 1000)
    own = [kept.info for kept in exchange.state.part(Runs).shelf if kept.owner == exchange.caller.key]
    return Answer(RunList([msgspec.structs.replace(info, usage=_short(info)) for info in own[:most]]))


def _short(info: RunInfo) -> Any:
    return msgspec.structs.replace(info.usage, receipts=[])


async def retrieve(exchange: Exchange) -> Answer:
    return Answer(exchange.state.part(Runs).shelf.find(exchange.caller, exchange.path("id")).info)


async def events(exchange: Exchange) -> Answer | web.StreamResponse:
    kept = exchange.state.part(Runs).shelf.find(exchange.caller, exchange.path("id"))
    last = exchange.header("last-event-id")
    if last is not None and not re.fullmatch("[0-9]{1,9}", last):
        raise HttpError(400, f"last-event-id {last[:80]!r} is none", code="invalid_value", field="last-event-id")
    if last is None and "after" not in exchange.request.query:
        return await _events(exchange, kept, 0)
    return await _events(exchange, kept, exchange.whole_number("after", int(last or 0)) + 1)


async def cancel(exchange: Exchange) -> Answer:
    kept = exchange.state.part(Runs).shelf.find(exchange.caller, exchange.path("id"))
    await kept.cancel()
    return Answer(kept.info)


async def delete(exchange: Exchange) -> Answer:
    shelf = exchange.state.part(Runs).shelf
    kept = shelf.find(exchange.caller, exchange.path("id"))
    await kept.cancel()
    shelf.forget(kept.info.id)
    return Answer(kept.info)


async def explain_program(exchange: Exchange) -> Answer:
    own = _find(exchange)
    asked: ExplainRequest = exchange.body
    return await _explain(exchange, own.name, own.hash, own.program, own.read(asked.arguments), asked.cache_salt)


async def explain_inline(exchange: Exchange) -> Answer:
    asked: InlineExplain = exchange.body
    made = made_of(asked.program, exchange.state.part(Runs).registry.tools)
    name, hash = asked.program.name, _hash(asked.program)
    return await _explain(exchange, name, hash, made, {"arguments": asked.arguments}, asked.cache_salt)


async def _explain(
    exchange: Exchange,
    name: str,
    hash: str,
    made: SglFunction,
    arguments: Mapping[str, Any],
    salt: str | None,
) -> Answer:
    namespace, thinking = namespace_of(exchange.caller, salt), exchange.state.config.thinking
    steps, stopped = await explain(exchange.state.engine, made, arguments, namespace, thinking)
    return Answer(explanation(name, hash, steps, stopped))


_NAME = "/v1/programs/{name:[^/:]+}"
_RUN = "/v1/runs/{id:[^/:]+}"
ROUTES = (
    Route("GET", "/v1/programs", programs, "weft", "The programs and tools served.", reply=ProgramList),
    Route("GET", _NAME, program, "weft", "One program.", reply=ProgramInfo, statuses=(404,)),
    Route(
        "POST", _NAME + "/runs", run, "weft", "Run a program: waited for, streamed, or in the background.",
        body=RunOptions, reply=RunInfo, events=RunEvent, size="large", gated=True,
    ),
    Route(
        "POST", _NAME + ":explain", explain_program, "weft", "What a run would take now.",
        body=ExplainRequest, reply=Explanation, size="large", gated=True,
    ),
    Route(
        "POST", "/v1/runs", run_inline, "weft", "Run a program in JSON.",
        body=InlineRun, reply=RunInfo, events=RunEvent, size="large", gated=True,
    ),
    Route(
        "POST", "/v1/runs:explain", explain_inline, "weft", "What a run of a program in JSON would take now.",
        body=InlineExplain, reply=Explanation, size="large", gated=True,
    ),
    Route(
        "GET", "/v1/runs", runs, "weft", "The caller's runs, the latest first.",
        reply=RunList, query={"limit": {"type": "integer", "minimum": 0}},
    ),
    Route("GET", _RUN, retrieve, "weft", "A run.", reply=RunInfo, statuses=(404,)),
    Route(
        "GET", _RUN + "/events", events, "weft", "A run's events, from behind Last-Event-ID on.",
        events=RunEvent, statuses=(404,), query={"after": {"type": "integer", "minimum": 0}},
    ),
    Route("POST", _RUN + "/cancel", cancel, "weft", "End a run.", reply=RunInfo, statuses=(404,)),
    Route("DELETE", _RUN, delete, "weft", "Forget a run; one under way ends.", reply=RunInfo, statuses=(404,)),
)  # fmt: skip
