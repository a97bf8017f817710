"""Several answers drawn side by side, and a judge that reads each beside the facts."""

from __future__ import annotations

from typing import Any

import sglang as sgl


@sgl.function
def fork_and_judge(s: Any, facts: str, attribute: str, name: str, width: int = 4) -> None:
    """Ask for an attribute of `name` according to `facts`, `width` times at the run's own temperature, and judge
    every answer.

    Sets `answers`, `verdicts` (how much likelier yes is than no, in log-probability) and `answer`, the one with
    the best verdict. `width` generations and as many choices; the facts are computed once.
    """
    s += sgl.user_begin() + facts + "\n"
    s.sync()
    drafts = s.fork(width)
    for draft in drafts:
        draft += f"What is the {attribute} of {name}?" + sgl.user_end()
        draft += sgl.assistant(sgl.gen("answer", max_tokens=16))
    answers = [draft["answer"].strip() for draft in drafts]
    drafts.join()

    judges = s.fork(width)
    for judge, answer in zip(judges, answers, strict=True):
        judge += f"Is it right that the {attribute} of {name} is {answer}? Answer yes or no." + sgl.user_end()
        judge += sgl.assistant(sgl.select("verdict", ["yes", "no"]))
    verdicts = [_margin(judge.get_meta_info("verdict")) for judge in judges]
    judges.join()

    s.set_var("answers", answers)
    s.set_var("verdicts", verdicts)
    s.set_var("answer", answers[verdicts.index(max(verdicts))])


def _margin(meta: dict[str, Any]) -> float:
    yes, no = meta["normalized_prompt_logprobs"]
    return round(float(yes - no), 2)
