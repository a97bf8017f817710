"""A debate: sides that know different things answer and object, a judge who has heard all decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def debate(s: Any, question: str, sides: Sequence[str]) -> None:
    """Each of `sides`, a text that this side alone knows, answers `question` and is told what the others say; then
    the judge, who knows all the texts, picks one of the answers.

    Sets `answers`, `agreed` (for each side, the answers it grants to be right) and `answer`. A generation a side,
    a choice for each answer of another side, and the judge's.
    """
    s += sgl.system("Give short answers.")
    speakers = s.fork(len(sides))
    for speaker, known in zip(speakers, sides, strict=True):
        speaker += sgl.user(f"{known}\n{question}")
        speaker += sgl.assistant(sgl.gen("said", max_tokens=16, temperature=0))
    answers = [speaker["said"].strip() for speaker in speakers]

    claims = list(dict.fromkeys(answers))
    agreed = []
    for speaker, own in zip(speakers, answers, strict=True):
        for claim in claims:
            if claim != own:
                speaker += sgl.user(f"I say it is {claim}. Is that right? yes or no")
                speaker += sgl.assistant(sgl.select(f"on {claim}", ["yes", "no"]))
        agreed.append([claim for claim in claims if claim == own or speaker[f"on {claim}"] == "yes"])
    speakers.join()

    s += sgl.user(" ".join(sides) + "\n" + question)
    s += sgl.assistant(sgl.select("verdict", claims))
    s.set_var("answers", answers)
    s.set_var("agreed", agreed)
    s.set_var("answer", s["verdict"])
