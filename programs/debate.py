"""A debate: sides that know different things answer and object, a judge who has heard all decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def debate(s: Any, attribute: str, name: str, sides: Sequence[str]) -> None:
    """Each of `sides`, a text that this side alone knows, says what the attribute of `name` is, and then what it
    grants of all that was said. The judge, who knows all the texts, picks one of the answers.

    Sets `answers`, `granted` (for each side, the answers it finds right) and `answer`. A generation a side, a
    choice for each side and different answer, and the judge's.
    """
    s += sgl.system("Give short answers.")
    speakers = s.fork(len(sides))
    for speaker, known in zip(speakers, sides, strict=True):
        speaker += sgl.user(known)
    sayings = [speaker.fork(1) for speaker in speakers]  # what is granted later does not depend on what was said
    for saying in sayings:
        saying += sgl.user(f"What is the {attribute} of {name}?")
        saying += sgl.assistant(sgl.gen("said", max_tokens=16, temperature=0))
    answers = [saying[0]["said"].strip() for saying in sayings]
    for saying in sayings:
        saying.join()
    claims = list(dict.fromkeys(answers))
    for claim in claims:
        speakers += sgl.user(f"Is it right that the {attribute} of {name} is {claim}? Answer yes or no.")
        speakers += sgl.assistant(sgl.select(claim, ["yes", "no"]))
    granted = [[claim for claim in claims if speaker[claim] == "yes"] for speaker in speakers]
    speakers.join()

    s += sgl.user(" ".join(sides) + f"\nWhat is the {attribute} of {name}?")
    s += sgl.assistant(sgl.select("verdict", claims))
    s.set_var("answers", answers)
    s.set_var("granted", granted)
    s.set_var("answer", s["verdict"])
