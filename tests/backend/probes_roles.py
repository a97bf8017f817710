"""Roles under DeepSeek-V4's layout: the exact prompt text, in every spelling, and reasoning split off it."""

from __future__ import annotations

from typing import Any

import sglang as sgl

from support.programs import Rig, reciting, rig, same
from weft.runtime.text.tokens import EOS

GEN = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@sgl.function
def as_functions(s: Any) -> None:
    s += sgl.system("Be brief.")
    s += sgl.user("One?")
    s += sgl.assistant("1: " + sgl.gen("a", **GEN))
    s += sgl.user("Two?")
    s += sgl.assistant(sgl.gen("b", **GEN))


@sgl.function
def as_methods(s: Any) -> None:
    s.system("Be brief.")
    with s.user():
        s += "One?"
    with s.assistant():
        s += "1: "
        s += sgl.gen("a", **GEN)
    s.user("Two?")
    s.assistant(sgl.gen("b", **GEN))


@sgl.function
def as_marks(s: Any) -> None:
    s += sgl.system_begin() + "Be brief." + sgl.system_end()
    s += sgl.user_begin()
    s += "One?"
    s += sgl.user_end()
    s += sgl.assistant_begin() + "1: " + sgl.gen("a", **GEN) + sgl.assistant_end()
    s += sgl.user_begin() + "Two?" + sgl.user_end()
    s += sgl.assistant_begin()
    s += sgl.gen("b", **GEN)
    s += sgl.assistant_end()


def _spelling(rig: Rig, program: Any) -> None:
    state = rig.run(program)
    a, b = state["a"], state["b"]
    before = "Be brief.<｜User｜>One?<｜Assistant｜></think>1: "
    between = f"{EOS}<｜User｜>Two?<｜Assistant｜></think>"
    same(state.text(), f"{before}{a}{between}{b}{EOS}")
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": f"1: {a}"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": b.lstrip()},
    ]
    same(state.messages(), said)
    # The second turn goes on from the tokens of the first.
    first = rig.complete(before, max_tokens=4, ignore_eos=True)
    tokens = [*rig.prompt(before), *first.tokens, *rig.engine.tokenizer.encode(between)]
    second = rig.complete(tokens, max_tokens=4, ignore_eos=True)
    same((a, b), (first.text, second.text))
    meta = state.get_meta_info("b")
    same(meta["prompt_tokens"], len(tokens))
    assert meta["cached_tokens"] >= len(rig.prompt(before)) + 3, meta


def probe_roles_as_functions(rig: Rig) -> None:
    _spelling(rig, as_functions)


def probe_roles_as_methods(rig: Rig) -> None:
    _spelling(rig, as_methods)


def probe_roles_as_marks(rig: Rig) -> None:
    _spelling(rig, as_marks)


def probe_roles_are_special_tokens(rig: Rig) -> None:
    tokens = rig.engine.tokenizer.encode(f"<｜User｜>a<｜Assistant｜></think>b{EOS}")
    same(len(tokens), 6)

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("a") + sgl.assistant_begin() + sgl.gen("x", max_tokens=1)

    same(rig.run(program).get_meta_info("x")["prompt_tokens"], 1 + 4)


def probe_consecutive_user_turns(rig: Rig) -> None:
    """One turn, joined by a blank line; so is a system prompt followed by a user."""

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("S")
        s += sgl.user("A") + sgl.user("B")
        s.user("C")
        s += sgl.assistant(sgl.gen("x", **GEN))
        s += sgl.user("D")

    state = rig.run(program)
    same(state.text(), f"S<｜User｜>A\n\nB\n\nC<｜Assistant｜></think>{state['x']}{EOS}<｜User｜>D")
    same([m["content"] for m in state.messages()], ["S", "A", "B", "C", state["x"].lstrip(), "D"])


def probe_thinking(_: Rig) -> None:
    with rig(thinking=True) as own:
        state = own.run(as_functions)
        turns = ("Be brief.<｜User｜>One?", f"1: {state['a']}{EOS}<｜User｜>Two?", f"{state['b']}{EOS}")
        same(state.text(), "<｜Assistant｜><think>".join(turns))


def probe_nested_roles(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("a" + sgl.assistant("b"))

    assert "Nested roles" in str(rig.error(rig.run(program)))


def probe_end_of_sentence_then_role_end(_: Rig) -> None:
    """The model's own EOS and the template's are one token in the history."""

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("Go:") + sgl.assistant(sgl.gen("a", max_tokens=9, temperature=0))
        s += sgl.user("?") + sgl.assistant(sgl.gen("b", max_tokens=1, temperature=0))

    with reciting(f"</think>abc{EOS}") as own:
        state = own.run(program)
        same(state["a"], "abc")
        prompt = f"<｜User｜>Go:<｜Assistant｜></think>abc{EOS}<｜User｜>?<｜Assistant｜></think>"
        same(state.get_meta_info("b")["prompt_tokens"], len(own.prompt(prompt)))
        # All of it was computed in the first turn but EOS, the last drawn and never fed token, and what follows.
        same(state.get_meta_info("b")["cached_tokens"], len(own.prompt("<｜User｜>Go:<｜Assistant｜></think>abc")))


# -- separate_reasoning ------------------------------------------------------------------------------------

# The parser of 0.5.23 for V4 looks for `<think>` in the output itself; 0.5.2 has none for V4, but one for R1,
# which in both versions takes the output to begin inside of `<think>`, as it does when the turn opens it.
OWN_PARSER = "deepseek-r1" if sgl.__version__ == "0.5.2" else "deepseek-v4"
THOUGHT = f":<think>Hm.</think>Yes{EOS}"  # what the reciting model says after a colon


def _reasoned(model_type: str) -> Any:
    return sgl.separate_reasoning(sgl.gen("x", max_tokens=20, temperature=0), model_type=model_type)


def probe_separate_reasoning_in_a_role(_: Rig) -> None:
    """The interpreter replaces the whole turn, also what the program wrote before the gen."""

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("Sure?")
        s += sgl.assistant("Well:" + _reasoned(OWN_PARSER))

    with reciting(THOUGHT) as own:
        state = own.run(program)
        same((state["x"], state["x_reasoning_content"]), ("Yes", "Hm."))
        same(state.text(), f"<｜User｜>Sure?<｜Assistant｜></think>Yes{EOS}")
        same(state.messages()[-1], {"role": "assistant", "content": "Yes"})


def probe_separate_reasoning_while_thinking(_: Rig) -> None:
    @sgl.function
    def program(s: Any, model_type: str) -> None:
        s += sgl.user("Sure?")
        s += sgl.assistant(_reasoned(model_type))
        s += sgl.user("Really?")
        s += sgl.assistant(sgl.gen("y", max_tokens=1, temperature=0))

    with reciting(f"<think>Hm.</think>Yes{EOS}", thinking=True) as own:
        state = own.run(program, "deepseek-r1")
        same((state["x"], state["x_reasoning_content"]), ("Yes", "Hm."))
        turns = "<｜User｜>Sure?<｜Assistant｜><think>Yes" + EOS + "<｜User｜>Really?<｜Assistant｜><think>"
        same(state.text(), turns + state["y"] + EOS)
        same(state.get_meta_info("y")["prompt_tokens"], len(own.prompt(turns)))
        if OWN_PARSER == "deepseek-v4":
            state = own.run(program, OWN_PARSER)
            same((state["x"], state["x_reasoning_content"]), ("Hm.</think>Yes", ""))


def probe_separate_reasoning_outside_a_role(_: Rig) -> None:
    """Without a role, the interpreter keeps all text and puts the answer behind it once more."""

    @sgl.function
    def program(s: Any) -> None:
        s += "Sure:" + _reasoned(OWN_PARSER)

    with reciting(THOUGHT) as own:
        state = own.run(program)
        same((state["x"], state["x_reasoning_content"]), ("Yes", "Hm."))
        same(state.text(), "Sure:<think>Hm.</think>YesYes")


def probe_separate_reasoning_by_an_unknown_parser(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Sure:" + _reasoned("abacus")

    assert "Unsupported model type" in str(rig.error(rig.run(program)))
