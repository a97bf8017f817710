"""langchain-openai, openai-agents and instructor, as their users have them, against a gateway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from support.gateway import MODEL, Gateway
from support.tree import ROOT

INSTRUCTOR = Path(sys.prefix) / "instructor-1.17.0"


PINS = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "name", ["openai", "anthropic", "langchain-openai", "openai-agents", "sglang", "schemathesis"]
)
def test_versions(name: str) -> None:
    """Of the clients that the tests here go through: those the tree was tested with."""
    assert f"{name}=={version(name)}" in PINS


class Seat(BaseModel):
    seat: int


# -- langchain ----------------------------------------------------------------------------------------------


@tool
def get_room(name: str) -> str:
    """Get the room of a person."""
    return "423"


def langchain(gateway: Gateway, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{gateway.url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_retries=0,
        **options,
    )


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(gateway: Gateway, responses: bool) -> None:
    model = langchain(gateway, use_responses_api=responses)
    reply = model.invoke("What is 2 + 3?")
    assert reply.text == "5" and reply.usage_metadata is not None
    assert reply.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream("What is 2 + 3?")) == "5"
    asked: list[Any] = [("user", "What is the room of Tolkar?")]
    called = model.bind_tools([get_room]).invoke(asked)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("get_room", {"name": "Tolkar"})]
    told = get_room.invoke(called.tool_calls[0])
    final = model.bind_tools([get_room]).invoke([*asked, called, told])
    assert final.text == "423"
    found = langchain(gateway, use_responses_api=responses, max_tokens=64).with_structured_output(Seat)
    assert isinstance(found.invoke("Rorna has seat 556."), Seat)


# -- openai-agents ------------------------------------------------------------------------------------------


@function_tool
def room_of(name: str) -> str:
    """Get the room of a person."""
    return "423"


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("form", [None, Seat])
def test_openai_agents(gateway: Gateway, api: str, form: Any) -> None:
    # The small model would call for ever where it may.
    choice = None if form is None else "none"

    async def loop() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            model: Any
            if api == "chat":
                model = OpenAIChatCompletionsModel(MODEL, client)
            else:
                model = OpenAIResponsesModel(MODEL, client)
            agent = Agent(
                name="clerk",
                instructions="You have tools.",
                model=model,
                tools=[room_of],
                output_type=form,
                model_settings=ModelSettings(temperature=0, max_tokens=128, tool_choice=choice),
            )
            config = RunConfig(tracing_disabled=True)
            asked = "What is the room of Tolkar?" if form is None else "What is 2 + 3?"
            whole = await Runner.run(agent, asked, run_config=config, max_turns=4)
            streamed = Runner.run_streamed(agent, asked, run_config=config, max_turns=4)
            kinds = [event.type async for event in streamed.stream_events()]
            return whole, streamed, kinds

    whole, streamed, kinds = asyncio.run(loop())
    assert "raw_response_event" in kinds
    if form is None:
        assert whole.final_output == streamed.final_output == "423"
        assert [type(item).__name__ for item in whole.new_items][:2] == ["ToolCallItem", "ToolCallOutputItem"]
    else:
        assert isinstance(whole.final_output, Seat)


# -- instructor ---------------------------------------------------------------------------------------------

_INSTRUCTOR = """
import sys
sys.path.insert(0, sys.argv[2])
import instructor, json, openai
from pydantic import BaseModel

class Seat(BaseModel):
    seat: int

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
    made = instructor.from_openai(client, mode=mode)
    asked = [{"role": "user", "content": "Rorna has seat 556. Reply in json."}]
    seat = made.chat.completions.create(
        model=sys.argv[3], messages=asked, response_model=Seat, max_tokens=96, temperature=0, max_retries=1
    )
    found[mode.value] = seat.seat
print(json.dumps({"version": instructor.__version__, "found": found}))
"""


def test_instructor(gateway: Gateway) -> None:
    """In a process of its own: it is installed beside the others."""
    if not INSTRUCTOR.is_dir():
        pytest.skip(f"no {INSTRUCTOR}; `make test` makes it")
    command = [sys.executable, "-c", _INSTRUCTOR, gateway.url, str(INSTRUCTOR), MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert INSTRUCTOR.name.endswith(told["version"]) and len(told["found"]) == 3
    assert all(isinstance(seat, int) for seat in told["found"].values())
