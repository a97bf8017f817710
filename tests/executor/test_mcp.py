"""Tools of real MCP servers: one in a process of its own, one in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from mcp import StdioServerParameters
from mcp.server import MCPServer
from mcp.types import ToolAnnotations

from support.executor import GEN, check, executing
from weft.backend.executor import ToolError
from weft.backend.executor.mcp_tools import mcp_tools
from weft.runtime.errors import ConfigError

SERVER = """
from mcp.server import MCPServer
server = MCPServer("numbers")

@server.tool()
def add(left: int, right: int) -> int:
    "Add two numbers."
    return left + right

@server.tool()
def fail() -> str:
    raise ValueError("no luck")

server.run()
"""


def in_memory() -> MCPServer:
    server = MCPServer("numbers")
    left = [2]

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def flaky() -> str:
        """Fails twice."""
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("not yet")
        return "at last"

    @server.tool()
    def other() -> str:
        return "other"

    return server


@sgl.function
def adding(s: Any, tools: dict[str, Any]) -> Any:
    s += "a" + sgl.gen("x", **GEN)
    total = s.call(tools["add"], left=2, right=3)
    with pytest.raises(ToolError, match="Error executing tool fail"):
        s.call(tools["fail"])
    with pytest.raises(ToolError, match="left"):
        s.call(tools["add"], left="two", right=3)
    return total


def test_tools_of_a_server_process(tmp_path: Path) -> None:
    file = tmp_path / "server.py"
    file.write_text(SERVER)

    async def work() -> None:
        async with (
            mcp_tools(StdioServerParameters(command=sys.executable, args=[str(file)])) as tools,
            executing() as executor,
        ):
            named = {own.name: own for own in tools}
            function = named["add"].declared["function"]
            assert function["description"] == "Add two numbers."
            assert function["parameters"]["properties"].keys() == {"left", "right"}
            ended = await executor.run(adding, named)
            assert ended.value == "5" and not named["add"].idempotent

    check(work())


def test_what_only_reads_may_be_tried_again() -> None:
    async def work() -> None:
        async with mcp_tools(in_memory(), only=["flaky"], attempts=3) as tools, executing() as executor:
            (flaky,) = tools
            assert flaky.idempotent

            @sgl.function
            def program(s: Any) -> Any:
                return s.call(flaky)

            assert (await executor.run(program)).value == "at last"
        with pytest.raises(ConfigError, match="missing"):
            async with mcp_tools(in_memory(), only=["missing"]):
                pass

    check(work())
