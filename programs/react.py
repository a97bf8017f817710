"""ReAct: thought, act, observation, again and again until the model answers."""

from __future__ import annotations

import json
from typing import Any

import sglang as sgl

from weft.backend.executor import Toolbox


@sgl.function
def react(s: Any, question: str, tools: Toolbox, system: str = "", most: int = 8) -> None:
    """Let the model think, call a tool and read what it returned, at most `most` times.

    Sets `steps`, a dict with `thought`, `act` ([tool, arguments]) and `observation` for each call, and `answer`
    (None if there was none). One generation for each round of calls and one for the answer.
    Needs the executor: `s.turn`. Thoughts are there with `ProgramExecutor(engine, thinking=True)`, else None.
    """
    s += sgl.system(system + tools.text)
    s += sgl.user(question)
    steps: list[dict[str, Any]] = []
    answer = None
    for number in range(1, most + 1):
        turn = s.turn(f"turn {number}", tools, temperature=0)
        if not turn.results:
            answer = turn.content.strip()
            break
        for result in turn.results:
            act = [result.call.name, json.loads(result.call.arguments)]
            steps.append({"thought": turn.reply.reasoning, "act": act, "observation": result.text})
    s.set_var("steps", steps)
    s.set_var("answer", answer)
