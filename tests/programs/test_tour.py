"""The tour runs, and what it does greedily is the same every time and follows from the model alone."""

from __future__ import annotations

import random
from typing import Any

from support.programs import guarded, rig
from weft.programs.tour import tour
from weft.runtime.text.tokens import EOS

SYSTEM = "You answer briefly and keep to what was asked."


def run(topic: str) -> Any:
    with rig() as own:
        state = guarded(lambda: own.run(tour, topic))
        assert state.error() is None
        return state


def test_greedy_parts_do_not_change() -> None:
    random.seed(1)
    first = run("looms")
    random.seed(2)
    second = run("looms")
    assert first["fact"] == second["fact"]
    assert first["draft"] != second["draft"]  # drawn at temperature 0.8
    assert (first["best"], first["reason"]) == (second["best"], second["reason"])
    assert first.text() == second.text()  # the drafts are left beside it
    assert run("dyes")["fact"] != first["fact"]


def test_text_and_facts() -> None:
    state = run("looms")
    with rig() as own:
        before = f"{SYSTEM}<｜User｜>Name one thing about looms.<｜Assistant｜></think>"
        fact = own.complete(before, max_tokens=24)
        assert state["fact"] == fact.text
        assert len(state["draft"]) == 3
        assert state["best"] in ("1", "2", "3")
        turns = [
            f"{before}{fact.text}{EOS}<｜User｜>Say more.<｜Assistant｜></think>",
            f"I prefer number {state['best']}.{EOS}<｜User｜>Why?<｜Assistant｜></think>",
            f"{state['reason']}{EOS}",
        ]
        assert state.text() == "".join(turns)
        assert [message["role"] for message in state.messages()] == [
            *("system", "user", "assistant"),
            *("user", "assistant", "user", "assistant"),
        ]


def test_figures() -> None:
    """The drafts share everything before them."""
    state = run("looms")
    figures = state["figures"]
    assert list(figures) == ["fact", "draft 1", "draft 2", "draft 3", "reason"]
    assert figures["fact"]["cached_tokens"] == 0
    (common,) = {figures[f"draft {i}"]["cached_tokens"] for i in (1, 2, 3)}
    for i in (1, 2, 3):
        figure = figures[f"draft {i}"]
        # A draft's own: the assistant's mark, `</think>`, and its number.
        assert figure["prompt_tokens"] - common == 2 + len(f"{i}. ")
    # The choice between them did not cost the KV of what came before.
    assert figures["reason"]["cached_tokens"] == common + 2 + len("I prefer number ")
