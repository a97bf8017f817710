"""An agent that calls tools until it can answer, in V4's own tool-call layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sglang as sgl

from weft.runtime.text.chat import tools_text
from weft.runtime.text.chat_output import Reply, ReplyFormat, parse

_FORM = ReplyFormat(tool_calls=True)
Run = Callable[[str, dict[str, Any]], str]


@sgl.function
def tool_agent(
    s: Any, question: str, tools: Sequence[Mapping[str, Any]], run: Run, system: str = "", most: int = 8
) -> None:
    """Ask `question`; every call the model makes is run and its result told, at most `most` times.

    tools: declared as in Chat Completions. run: called with a tool's name and arguments, returns its result.
    Sets `answer` (None if there was none), and `calls`: [name, arguments, result] of each call. One generation
    for each round of calls and one for the answer.
    """
    s += sgl.system(system + tools_text(tools))
    s += sgl.user(question)
    calls: list[list[Any]] = []
    answer = None
    for turn in range(most + 1):
        name = f"turn {turn + 1}"
        s += sgl.assistant(sgl.gen(name, max_tokens=256, temperature=0))
        reply = parse(s[name], _FORM)
        if reply.finish_reason != "tool_calls":
            answer = reply.content.strip()
            break
        s += sgl.user("".join(f"<tool_result>{result}</tool_result>" for result in _run(reply, run, calls)))
    s.set_var("answer", answer)
    s.set_var("calls", calls)


def _run(reply: Reply, run: Run, calls: list[list[Any]]) -> list[str]:
    """The results of a turn's calls, which are noted."""
    results = []
    for call in reply.tool_calls:
        arguments = json.loads(call.arguments)
        results.append(run(call.name, arguments))
        calls.append([call.name, arguments, results[-1]])
    return results
