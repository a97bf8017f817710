"""A router: each question goes to the one tool that can answer it."""

from __future__ import annotations

import json
from typing import Any

import sglang as sgl

from weft.backend.executor import Toolbox


@sgl.function
def tool_router(s: Any, question: str, tools: Toolbox, system: str = "") -> None:
    """Have the model call exactly one tool, run it, and answer with what it returned.

    Sets `tool` and `arguments`, what was called; `result`, what the model was told; `answer`. Two generations: the
    first cannot do without a call, the second cannot make one. Needs the executor: `s.turn`.
    """
    s += sgl.system(system + tools.text)
    s += sgl.user(question)
    (result,) = s.turn("route", tools, choice="required", parallel=False, temperature=0).results
    s.set_var("tool", result.call.name)
    s.set_var("arguments", json.loads(result.call.arguments))
    s.set_var("result", result.text)
    s.set_var("answer", s.turn("reply", tools, choice="none", temperature=0).content.strip())
