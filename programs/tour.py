"""A tour of the language: roles, two turns, a fork that drafts in parallel, and a choice between the drafts."""

from __future__ import annotations

from typing import Any

import sglang as sgl

_DRAFTS = 3


@sgl.function
def tour(s: Any, topic: str) -> None:
    """Ask about `topic`, draft three follow-ups side by side, pick one by likelihood, and end on it."""
    s += sgl.system("You answer briefly and keep to what was asked.")
    s += sgl.user(f"Name one thing about {topic}.")
    s += sgl.assistant(sgl.gen("fact", max_tokens=24, temperature=0))
    figures = {"fact": s.get_meta_info("fact")}

    # Everything above is computed once and shared by the three drafts.
    s += sgl.user("Say more.")
    s.sync()
    drafts = s.fork(_DRAFTS)
    for i, draft in enumerate(drafts):
        draft += sgl.assistant(f"{i + 1}. " + sgl.gen("draft", max_tokens=16, temperature=0.8))
    for i, draft in enumerate(drafts):
        figures[f"draft {i + 1}"] = draft.get_meta_info("draft")
    drafts.join()

    s += sgl.assistant("I prefer number " + sgl.select("best", [str(i + 1) for i in range(_DRAFTS)]) + ".")
    s += sgl.user("Why?")
    s += sgl.assistant(sgl.gen("reason", max_tokens=24, temperature=0))
    figures["reason"] = s.get_meta_info("reason")
    s.set_var("figures", figures)
