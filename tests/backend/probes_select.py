"""select: the three methods decide as brute force over the model's logits and sglang's own formulas do."""

from __future__ import annotations

import math
from typing import Any

import sglang as sgl
from sglang.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)

from support.programs import Rig, same

# Choices of unequal length, one the beginning of another, one of several bytes a character.
CHOICES = ["yes", "no", "not at all", "perhaps é", "n"]
QUESTIONS = ["Will it rain? ", "A", "B:", "<｜User｜>Do you?<｜Assistant｜></think>"]
METHODS: dict[str, ChoicesSamplingMethod] = {
    "length": token_length_normalized,
    "greedy": greedy_token_selection,
    "unconditional": unconditional_likelihood_normalized,
}


@sgl.function
def program(s: Any, question: str, choices: list[str], method: ChoicesSamplingMethod) -> None:
    s += question
    s += sgl.select("pick", choices, choices_method=method)
    s += "." + sgl.gen("after", max_tokens=2, temperature=0)


_KNOWN: dict[Any, list[list[Any]]] = {}  # all probes here use one model


def entries(rig: Rig, before: list[int], tokens: list[int]) -> list[list[Any]]:
    """sglang's entries of `tokens` after `before`, from one forward pass; the very first token has no value."""
    key = (*before, None, *tokens)
    if key not in _KNOWN:
        values = rig.logprobs(before, tokens) if before else [None, *rig.logprobs(tokens[:1], tokens[1:])]
        decode = rig.engine.tokenizer.decode
        _KNOWN[key] = [[value, token, decode([token])] for value, token in zip(values, tokens, strict=True)]
    return _KNOWN[key]


def decide(rig: Rig, question: str, choices: list[str], method: ChoicesSamplingMethod) -> ChoicesDecision:
    """The decision from one forward pass per choice, and without the engine."""
    encoded = [rig.engine.tokenizer.encode(choice) for choice in choices]
    conditional = [entries(rig, rig.prompt(question), tokens) for tokens in encoded]
    return method(
        choices=choices,
        normalized_prompt_logprobs=[sum(e[0] for e in own) / len(own) for own in conditional],
        input_token_logprobs=conditional,
        output_token_logprobs=[[] for _ in choices],
        unconditional_token_logprobs=[entries(rig, [], tokens) for tokens in encoded],
    )


def alike(actual: Any, expected: Any) -> None:
    """Equal, but for rounding: [logprob, id, text] entries in lists of lists."""
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected), (actual, expected)
        for a, b in zip(actual, expected, strict=True):
            alike(a, b)
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, abs_tol=1e-4), (actual, expected)
    else:
        same(actual, expected)


def _check(rig: Rig, name: str) -> set[str]:
    picks = set()
    for question in QUESTIONS:
        state = rig.run(program, question, CHOICES, METHODS[name])
        expected = decide(rig, question, CHOICES, METHODS[name])
        same((question, state["pick"]), (question, expected.decision))
        meta = state.get_meta_info("pick")
        same(sorted(meta), sorted(expected.meta_info))
        for key, value in expected.meta_info.items():
            alike(meta[key], value)
        same(state.text(), f"{question}{state['pick']}.{state['after']}")
        same(state["after"], rig.complete(f"{question}{state['pick']}.", max_tokens=2).text)
        picks.add(state["pick"])
    return picks


def probe_token_length_normalized(rig: Rig) -> None:
    assert len(_check(rig, "length")) > 1, "always the same pick proves little"


def probe_greedy_token_selection(rig: Rig) -> None:
    assert len(_check(rig, "greedy")) > 1


def probe_unconditional_likelihood_normalized(rig: Rig) -> None:
    assert len(_check(rig, "unconditional")) > 1


def probe_methods_differ(rig: Rig) -> None:
    """Somewhere, or the three probes above could not tell them apart."""
    picks = [[decide(rig, q, CHOICES, method).decision for q in QUESTIONS] for method in METHODS.values()]
    assert picks[0] != picks[1] and picks[1] != picks[2] and picks[0] != picks[2], picks


def probe_gen_with_choices(rig: Rig) -> None:
    @sgl.function
    def choosing(s: Any) -> None:
        s += QUESTIONS[0] + sgl.gen("a", choices=CHOICES)
        s += " " + sgl.gen("b", choices=CHOICES, choices_method=greedy_token_selection)

    state = rig.run(choosing)
    same(state["a"], decide(rig, QUESTIONS[0], CHOICES, token_length_normalized).decision)
    before = f"{QUESTIONS[0]}{state['a']} "
    same(state["b"], decide(rig, before, CHOICES, greedy_token_selection).decision)


def probe_unnamed_select(rig: Rig) -> None:
    @sgl.function
    def unnamed(s: Any) -> None:
        s += QUESTIONS[1] + sgl.select(choices=CHOICES)

    expected = decide(rig, QUESTIONS[1], CHOICES, token_length_normalized).decision
    same(rig.run(unnamed).text(), QUESTIONS[1] + expected)


def probe_more_choices_than_slots(rig: Rig) -> None:
    choices = [f"{i:02}" for i in range(rig.engine.slots + 2)]
    state = rig.run(program, QUESTIONS[0], choices, token_length_normalized)
    same(state.error(), None)
    same(state["pick"], decide(rig, QUESTIONS[0], choices, token_length_normalized).decision)


def probe_select_after_gen(rig: Rig) -> None:
    """Scored after the tokens that were drawn, also where their text is not UTF-8."""

    @sgl.function
    def drawing(s: Any) -> None:
        s += "Rain? " + sgl.gen("x", max_tokens=10, temperature=0)
        s += sgl.select("pick", CHOICES)

    drawn = rig.complete("Rain? ", max_tokens=10)
    state = rig.run(drawing)
    same(state["x"], drawn.text)
    before = [*rig.prompt("Rain? "), *drawn.tokens[: drawn.kept]]
    scores = state.get_meta_info("pick")["input_token_logprobs"]
    alike(scores, [entries(rig, before, rig.engine.tokenizer.encode(c)) for c in CHOICES])


def probe_select_keeps_what_was_computed(rig: Rig) -> None:
    """What follows a choice computes the choice and itself, not the text before them."""
    state = rig.run(program, "A question of some length: ", ["yes", "no"], token_length_normalized)
    meta = state.get_meta_info("after")
    same(meta["cached_tokens"], len(rig.prompt("A question of some length: ")))
    same(meta["prompt_tokens"] - meta["cached_tokens"], len(state["pick"]) + 1)


def probe_own_method(rig: Rig) -> None:
    """A method of the user's is called as sglang's are, and its error is the state's."""
    seen: dict[str, Any] = {}

    class Last(ChoicesSamplingMethod):
        def __call__(self, **given: Any) -> ChoicesDecision:
            seen.update(given)
            return ChoicesDecision(decision=given["choices"][-1], meta_info={"why": "last"})

    class Broken(ChoicesSamplingMethod):
        def __call__(self, **given: Any) -> ChoicesDecision:
            raise KeyError("undecided")

    state = rig.run(program, QUESTIONS[0], CHOICES, Last())
    same((state["pick"], state.get_meta_info("pick")), (CHOICES[-1], {"why": "last"}))
    same((seen["choices"], seen["unconditional_token_logprobs"]), (CHOICES, None))
    same([len(own) for own in seen["input_token_logprobs"]], [len(c.encode()) for c in CHOICES])
    assert isinstance(rig.error(rig.run(program, QUESTIONS[0], CHOICES, Broken())), KeyError)
