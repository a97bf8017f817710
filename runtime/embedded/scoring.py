"""Scores of a model on held-out dialogues, asked turn by turn through an engine."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.embedded.data import judge_reply, make, run_tool
from weft.runtime.embedded.dialogue import Example, Scored
from weft.runtime.engine.front import Engine
from weft.runtime.text.chat import render
from weft.runtime.text.chat_output import Reply, parse

_PARAMS = SamplingParams(max_tokens=256, temperature=0)
_ROUNDS = 8  # calls of tools in one agent loop


@dataclass
class Score:
    """right of `asked`; replies: the tokens of each turn asked, in order."""

    right: int = 0
    asked: int = 0
    replies: list[list[int]] = field(default_factory=list)

    def add(self, right: bool, tokens: list[int]) -> None:
        self.right += right
        self.asked += 1
        self.replies.append(tokens)

    @property
    def share(self) -> float:
        return self.right / max(self.asked, 1)


def held_out(task: str, count: int, *, tokens: int | None = None, seed: int = 0) -> list[Example]:
    """Held-out dialogues of one task alone. tokens: their length, for tasks that have one."""
    return [
        make(task, "heldout", random.Random(f"{task} {tokens} {seed} {i}"), tokens, plain=True)
        for i in range(count)
    ]


def turns(examples: Iterable[Example]) -> Iterator[tuple[Example, Scored]]:
    """Every assistant turn that counts for its dialogue's own task."""
    for example in examples:
        for scored in example.scored:
            if scored.task == example.task:
                yield example, scored


async def score_turns(engine: Engine, examples: Sequence[Example], *, together: int) -> dict[str, Score]:
    """Each turn behind the dialogue as it should be so far; `together` at a time. By task."""
    scores: dict[str, Score] = defaultdict(Score)
    limit = asyncio.Semaphore(together)

    async def one(example: Example, scored: Scored) -> tuple[bool, list[int]]:
        async with limit:
            reply, tokens = await _reply(engine, example, example.messages[: scored.turn], scored.thinking)
        return judge_reply(example, scored, reply), tokens

    asked = list(turns(examples))
    for (example, _), (right, tokens) in zip(
        asked, await asyncio.gather(*(one(*turn) for turn in asked)), strict=True
    ):
        scores[example.task].add(right, tokens)
    return dict(scores)


async def score_loops(engine: Engine, examples: Sequence[Example]) -> Score:
    """Dialogues with tools from the first question to the last answer, with the tools really run."""
    total = Score()
    for example in examples:
        total.add(await _loop(engine, example), [])
    return total


async def _loop(engine: Engine, example: Example) -> bool:
    """Ask each question of the dialogue in turn, run what is called, and compare the answers."""
    messages: list[dict[str, Any]] = []
    wanted = iter([scored.answer for scored in example.scored if scored.answer is not None])
    for message in example.messages:
        if message["role"] not in ("system", "user"):
            continue
        messages.append(message)
        if message["role"] == "user" and not await _answered(engine, example, messages, next(wanted)):
            return False
    return True


async def _answered(engine: Engine, example: Example, messages: list[dict[str, Any]], wanted: str | None) -> bool:
    """Let the model call tools until it answers; its turns join `messages`."""
    for _ in range(_ROUNDS):
        reply, _ = await _reply(engine, example, messages, example.thinking)
        turn: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning is not None:
            turn["reasoning_content"] = reply.reasoning
        if reply.finish_reason != "tool_calls":
            messages.append(turn)
            return reply.finish_reason == "stop" and reply.content.strip() == wanted
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
        messages.append(turn)
        for call in reply.tool_calls:
            result = run_tool(example, call.name, call.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return False


async def _reply(
    engine: Engine, example: Example, messages: Sequence[dict[str, Any]], thinking: bool
) -> tuple[Reply, list[int]]:
    prompt = render(engine.tokenizer, messages, thinking=thinking, tools=example.tools)
    output = await engine.generate(prompt.tokens, _PARAMS)
    reason: Literal["stop", "length"] = "length" if output.finish_reason == "length" else "stop"
    return parse(output.text, prompt.form, reason), output.tokens
