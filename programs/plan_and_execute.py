"""Plan and execute: one plan, a sub-agent with tools for each subject, and a last turn over their results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import sglang as sgl

from weft.backend.executor import Toolbox


@sgl.function
def plan_and_execute(
    s: Any,
    goal: str,
    subjects: Sequence[str],
    tools: Toolbox,
    step: str = "What is the {} of {}?",
    finish: str = "Compute {}.",
    between: str = " + ",
) -> None:
    """Plan how to reach `goal` for a subject, do the steps for all subjects side by side, and join their results.

    goal: with {} where the subject stands. step: what a sub-agent asks at each step of the plan, of what the step
    before found. finish: what is asked at the end, of the results with `between` between them.
    Sets `plan`, `results` and `answer`. One generation for the plan, two for each subject and step, two more.
    Needs the executor with `thinking=True`, where the plan is what the model thinks first: `s.gather`, `s.turn`.
    """
    told = sgl.system(tools.text)
    with s.copy() as planner:
        planner += (
            told + sgl.user(goal.format(subjects[0])) + sgl.assistant(sgl.gen("plan", stop=".", temperature=0))
        )
        plan = [part.strip() for part in planner["plan"].partition(":")[2].split(",")]
    agents = [partial(_follow, told, plan, step, tools, subject) for subject in subjects]
    results = [branch.value for branch in s.gather(*agents, fresh=True)]
    s += told
    s.set_var("plan", plan)
    s.set_var("results", results)
    s.set_var("answer", _asked(s, finish.format(between.join(results)), tools))


def _follow(told: Any, plan: Sequence[str], step: str, tools: Toolbox, subject: str, s: Any) -> str:
    """A sub-agent: its history is its own, and empty at first."""
    s += told
    found = subject
    for part in plan:
        found = _asked(s, step.format(part, found), tools)
    return found


def _asked(s: Any, question: str, tools: Toolbox) -> str:
    """What the model says to a question after one call."""
    s += sgl.user(question)
    s.turn("act", tools, choice="required", parallel=False, temperature=0)
    answer: str = s.turn("result", tools, choice="none", temperature=0).content
    return answer.strip()
