"""Tree of thought: several next steps of every path, a judge that scores them, the best paths go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sglang as sgl


class Path(NamedTuple):
    """names: those it has come by. score: how much likelier a judge found yes than no, over all its steps."""

    state: Any
    names: tuple[str, ...]
    score: float


@sgl.function
def tree_of_thought(s: Any, facts: str, name: str, steps: Sequence[str], width: int = 4, keep: int = 2) -> None:
    """Follow `steps`, attributes such as boss or room, from `name` on: the boss of `name`, then the boss's room.

    Every path draws `width` next values at the run's own temperature. The judge reads each in its path; the `keep`
    best paths go on. Sets `path`, the names of the best one, `answer`, its last, and `tried`, how many there were.
    `width` generations for each path and step, and a choice for each different value.
    """
    s += sgl.system("Give short answers.")
    s += sgl.user(facts)
    best, tried = [Path(s, (name,), 0.0)], 0
    for step in steps:
        drawn = [(path, state) for path in best for state in path.state.fork(width)]
        for path, state in drawn:
            state += sgl.user(f"What is the {step} of {path.names[-1]}?")
            state += sgl.assistant(sgl.gen("next", max_tokens=12))
        # Of paths that came to the same, one is enough. The judge has not seen who said it.
        grown = {(*path.names, state["next"].strip()): (path, state) for path, state in drawn}
        judges = {names: path.state.fork(1)[0] for names, (path, _) in grown.items()}
        for names, judge in judges.items():
            judge += sgl.user(f"Is it right that the {step} of {names[-2]} is {names[-1]}? Answer yes or no.")
            judge += sgl.assistant(sgl.select("verdict", ["yes", "no"]))
        paths = [Path(state, names, path.score + _margin(judges[names])) for names, (path, state) in grown.items()]
        best = sorted(paths, key=lambda path: path.score, reverse=True)[:keep]
        tried += len(paths)
    s.set_var("path", list(best[0].names))
    s.set_var("answer", best[0].names[-1])
    s.set_var("tried", tried)


def _margin(state: Any) -> float:
    yes, no = state.get_meta_info("verdict")["normalized_prompt_logprobs"]
    return float(yes - no)
