"""Self-consistency: many answers to one question, and the one that most of them give."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sglang as sgl


@sgl.function
def self_consistency(s: Any, question: str, width: int = 8, system: str = "Give short answers.") -> None:
    """Draw `width` answers at the run's own temperature and take a vote.

    Sets `votes`, how many gave each answer, most first, and `answer`. `width` generations side by side; the
    question is computed once.
    """
    s += sgl.system(system)
    s += sgl.user(question)
    voters = s.fork(width)
    voters += sgl.assistant(sgl.gen("vote", max_tokens=64))
    votes = Counter(voter["vote"].strip() for voter in voters)
    voters.join()
    s.set_var("votes", dict(votes.most_common()))
    s.set_var("answer", votes.most_common(1)[0][0])
