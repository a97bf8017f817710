"""Tools of MCP servers, through the `mcp` package (`pip install weft[mcp]`).

async with mcp_tools("http://localhost:8000/mcp") as tools:
    await executor.run(agent, question, Toolbox(*tools))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

from weft.backend.executor.tools import Retry, Tool
from weft.runtime.errors import ConfigError


@asynccontextmanager
async def mcp_tools(
    server: Any, *, only: Collection[str] | None = None, timeout: float = 30.0, attempts: int = 1
) -> AsyncIterator[list[Tool]]:
    """The tools of a server: a URL, `mcp.StdioServerParameters`, or whatever `mcp.Client` takes. Calls go over
    the loop this is entered on, which has to be the executor's.

    only: their names, if not all. timeout: seconds for each call. attempts: of calls to those that the server says
    are idempotent or only read."""
    try:
        from mcp import Client
    except ImportError as error:
        raise ConfigError("server", server, "needs the package mcp: pip install weft[mcp]") from error
    connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def serve() -> None:
        # In a task of its own: what is raised where the tools are used does not pass through the client's groups.
        try:
            async with Client(server) as client:
                connected.set_result(client)
                await leave.wait()
        except Exception as error:
            if connected.done():
                raise
            connected.set_exception(error)

    task = asyncio.ensure_future(serve())
    try:
        client = await connected
        found = await _listed(client)
        for name in only or ():
            if name not in found:
                raise ConfigError("only", name, f"the server has {', '.join(found)}")
        yield [
            _tool(client, own, timeout, attempts) for name, own in found.items() if only is None or name in only
        ]
    finally:
        leave.set()
        await task


async def _listed(client: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cursor = None
    while True:
        page = await client.list_tools(cursor=cursor)
        found |= {own.name: own for own in page.tools}
        cursor = page.next_cursor
        if cursor is None:
            return found


def _tool(client: Any, own: Any, timeout: float, attempts: int) -> Tool:
    async def call(**arguments: Any) -> Any:
        result = await client.call_tool(own.name, arguments)
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise RuntimeError(text)
        return text if text or result.structured_content is None else result.structured_content

    hints = own.annotations
    idempotent = hints is not None and bool(hints.idempotent_hint or hints.read_only_hint)
    return Tool(
        call,
        name=own.name,
        description=own.description or "",
        parameters=own.input_schema,
        check=_as_given,
        timeout=timeout,
        retry=Retry(attempts) if idempotent else None,
        idempotent=idempotent,
        here=True,
    )


def _as_given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The server checks them."""
    return dict(arguments)
