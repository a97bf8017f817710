"""One dialogue, while it is made and when it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from weft.runtime.embedded.words import Draw


class Scored(msgspec.Struct, frozen=True):
    """An assistant turn that can be asked of a model.

    turn: its index in the messages. thinking: whether the turn is a thinking one. answer: what it has to say,
    if it says something; otherwise `tool` and `arguments` are what it has to call.
    """

    task: str
    turn: int
    thinking: bool
    answer: str | None = None
    tool: str | None = None
    arguments: dict[str, Any] | None = None


class Example(msgspec.Struct, frozen=True):
    """A dialogue in the shape of Chat Completions.

    scored: one for each assistant message, in order. thinking: the mode of the last turn; with tools, of all.
    data: what lookup tools find: tool, then argument, then result.
    """

    task: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    scored: list[Scored]
    data: dict[str, dict[str, str]]


def tool(name: str, description: str, argument: str) -> dict[str, Any]:
    """A tool of one string argument, as Chat Completions declares it."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


class Dialogue:
    """Takes the turns of one example in order. `task` is the one whose turns are being added."""

    def __init__(self, draw: Draw, task: str, thinking: bool) -> None:
        self.draw = draw
        self.task = task
        self.thinking = thinking
        self.tools: list[dict[str, Any]] = []
        self.data: dict[str, dict[str, str]] = {}
        self._messages: list[dict[str, Any]] = []
        self._scored: list[Scored] = []
        self._prefix = ""

    def system(self, text: str) -> None:
        self._messages.append({"role": "system", "content": text})

    def context(self, text: str) -> None:
        """Put text before the next user message."""
        self._prefix += text + "\n"

    def user(self, text: str) -> None:
        self._messages.append({"role": "user", "content": self._prefix + text})
        self._prefix = ""

    def answer(self, text: str, reasoning: str) -> None:
        """reasoning: written if the turn is a thinking one."""
        self._score(answer=text)
        self._messages.append({"role": "assistant", "content": text, "reasoning_content": reasoning})

    def ask(self, question: str, text: str, reasoning: str) -> None:
        self.user(question)
        self.answer(text, reasoning)

    def call(self, name: str, arguments: dict[str, Any], result: str, reasoning: str) -> None:
        """A turn that calls one tool, and what the tool returns."""
        self._score(tool=name, arguments=arguments)
        id = f"call_{len(self._messages)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"id": id, "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "reasoning_content": reasoning, "tool_calls": [call]}
        self._messages += [turn, {"role": "tool", "tool_call_id": id, "content": result}]

    def _score(self, **expected: Any) -> None:
        self._scored.append(Scored(self.task, len(self._messages), self.thinking, **expected))

    def done(self) -> Example:
        """V4 lays out no reasoning before the last user message unless there are tools, so only the last turn
        thinks then; the turns before it are those of a dialogue without thinking.
        """
        last = len(self._messages) - 1
        scored = self._scored
        if not self.tools:
            scored = [msgspec.structs.replace(s, thinking=s.thinking and s.turn == last) for s in scored]
        thinks = {s.turn for s in scored if s.thinking}
        messages = [m if i in thinks else _without_reasoning(m) for i, m in enumerate(self._messages)]
        return Example(self.task, messages, self.tools, self.thinking, scored, self.data)


def _without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
