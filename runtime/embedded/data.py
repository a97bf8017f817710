"""Seeded synthetic agent dialogues in V4's chat format: what the embedded model is trained and scored on.

`words` states how the train and the held-out split differ in values. They differ in templates as well: each
task keeps phrasings back, which say with the words of the others the same thing in another way. Answers have one
form in both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from weft.runtime.embedded.dialogue import Dialogue, Example, Scored
from weft.runtime.embedded.encoding import Encoded, encode
from weft.runtime.embedded.tasks import agents, arithmetic, facts, lists, records
from weft.runtime.embedded.words import Draw, Split
from weft.runtime.text.chat_output import Reply
from weft.runtime.text.tokenizer import Tokenizer

_BUILDERS: dict[str, Callable[[Dialogue, int | None], None]] = {
    "addition": arithmetic.addition,
    "calculator": arithmetic.calculator,
    "recall": facts.recall,
    "json_extract": records.json_extract,
    "table_extract": records.table_extract,
    "count": lists.count,
    "sort": lists.sort,
    "copy": lists.copy,
    "multiple_choice": facts.multiple_choice,
    "judge": facts.judge,
    "route": agents.route,
    "two_hop": facts.two_hop,
    "plan_act": agents.plan_act,
}
TASKS = tuple(_BUILDERS)
LONG_TASKS = ("recall", "json_extract", "table_extract", "two_hop")
TOOL_TASKS = ("calculator", "route", "plan_act")
TALK_TASKS = tuple(task for task in TASKS if task not in TOOL_TASKS)
_HARD = ("count", "judge", "sort", "two_hop", "table_extract")
WEIGHTS: Mapping[str, float] = (
    {task: 1.0 for task in TASKS}
    | {task: 1.5 for task in _HARD}
    | {"addition": 2.0, "recall": 2.0, "multiple_choice": 2.0}
)

_SYSTEM = (
    "You are a helpful agent.",
    "Give short answers.",
    "Answer with the value only.",
    "You are an agent. Give exact answers.",
    "Be short and exact.",
    "Answer in one line.",
)
_HELD_SYSTEM = ("You are an exact agent.", "Give the value only.", "Give short answers in one line.")
_BETTER_THOUGHT = {"two_hop": 0.85, "multiple_choice": 0.7, "judge": 0.7}  # hard to answer in the head
# Tokens that an example of a long task needs beyond its filler.
_SHORTEST_LONG = 160


def make(
    task: str, split: Split, rng: random.Random, tokens: int | None = None, *, plain: bool = False
) -> Example:
    """One dialogue whose last task is `task`.

    tokens: for `LONG_TASKS`, how long the dialogue is to be: up to a seventh less, from 1,000 on. In recall the
    fact first asked for then stands at its beginning. plain: no turns of other tasks before.
    """
    draw = Draw(split, rng)
    d = Dialogue(draw, task, thinking=draw.chance(_BETTER_THOUGHT.get(task, 0.4)))
    if draw.chance(0.5):
        d.system(draw.phrase(_SYSTEM, _HELD_SYSTEM))
    if task in TALK_TASKS and not plain:
        while draw.chance(0.15):
            _interlude(d)
        if task == "recall" and tokens is None and draw.chance(0.3):
            facts.recall_later(d, lambda: _interlude(d))
            return d.done()
    # Estimates fall short by up to a fifteenth.
    _BUILDERS[task](d, None if tokens is None else int(tokens * 0.93))
    return d.done()


def _interlude(d: Dialogue) -> None:
    """Turns of some other task."""
    task, d.task = d.task, d.draw.rng.choice(TALK_TASKS)
    _BUILDERS[d.task](d, None)
    d.task = task


def mixture(
    tokenizer: Tokenizer,
    split: Split,
    seed: int,
    max_tokens: int,
    weights: Mapping[str, float] = WEIGHTS,
    *,
    worker: int = 0,
    workers: int = 1,
    long: float = 0.25,
) -> Iterator[tuple[Example, Encoded]]:
    """Examples without end, none longer than max_tokens, each with its tokens.

    Example i depends on the arguments and on i alone; worker w of n yields those with i % n == w. long: the share
    of examples of `LONG_TASKS` that are given a length, log-uniform up to max_tokens. Where a task has nothing
    so short, another takes its place.
    """
    names, odds = list(weights), list(weights.values())
    index = worker
    while True:
        rng = random.Random(f"{split} {seed} {index}")
        while (made := _fitting(tokenizer, split, rng, rng.choices(names, odds)[0], max_tokens, long)) is None:
            pass
        yield made
        index += workers


def _fitting(
    tokenizer: Tokenizer, split: Split, rng: random.Random, task: str, max_tokens: int, long: float
) -> tuple[Example, Encoded] | None:
    """An example that is not too long, if a few attempts give one."""
    tokens: int | None = None
    if task in LONG_TASKS and max_tokens > _SHORTEST_LONG and rng.random() < long:
        tokens = int(_SHORTEST_LONG * (max_tokens / _SHORTEST_LONG) ** rng.random())
    for _ in range(8):
        example = make(task, split, rng, tokens)
        encoded = encode(tokenizer, example)
        if len(encoded.tokens) <= max_tokens:
            return example, encoded
        tokens = int(tokens * 0.9) if tokens else None
    return None


def judge_reply(example: Example, scored: Scored, reply: Reply) -> bool:
    """Whether the reply is the one expected: the answer and nothing else, or exactly the one call."""
    if scored.tool is None:
        return not reply.tool_calls and not reply.unparsed and reply.content.strip() == scored.answer
    if reply.finish_reason != "tool_calls" or len(reply.tool_calls) != 1 or reply.unparsed:
        return False
    call = reply.tool_calls[0]
    return call.name == scored.tool and msgspec.json.decode(call.arguments) == scored.arguments


_EXPRESSION = re.compile(r"(\d{1,9}) ?([-+*]) ?(\d{1,9})")


def run_tool(example: Example, name: str, arguments: str) -> str:
    """What the tool returns; arguments are a JSON object, as a complete `ToolCall` has them."""
    given: dict[str, Any] = msgspec.json.decode(arguments, type=dict[str, Any])
    if name not in (tool["function"]["name"] for tool in example.tools):
        return "error: no such tool"
    if name == "calculator":
        expression = _EXPRESSION.fullmatch(str(given.get("expression")))
        if expression is None:
            return "error: not an expression"
        return str(arithmetic.compute(int(expression[1]), expression[2], int(expression[3])))
    return example.data.get(name, {}).get(str(given.get("name")), "error: not found")


def chance(task: str) -> float:
    """About the score of always giving the most frequent answer."""
    return {"multiple_choice": 0.25, "judge": 0.5, "count": 0.25}.get(task, 0.0)
