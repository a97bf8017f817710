"""A text continues from the tokens it was made of, whatever became of their KV."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sglang as sgl

from support.engine import byte_tokenizer
from support.programs import FIRST_BYTE, POOLS, Rig, babbling_model, guarded, open_engine, reciting, rig
from weft.runtime.text.tokens import BOS, EOS, THINK_END, USER


def tokens_before(state: Any, name: str) -> list[int]:
    """The tokens that a gen with these options went on from: its prompt's log-probabilities name them."""
    meta = state.get_meta_info(name)
    tokens = [token for _, token, _ in meta["input_token_logprobs"]]
    assert len(tokens) == meta["prompt_tokens"]
    return tokens


NAMING: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "return_logprob": True, "logprob_start_len": 0}


@sgl.function
def cut(s: Any, options: dict[str, Any]) -> None:
    s += "go:"
    s += sgl.gen("x", **{"max_tokens": 30, "temperature": 0, **options})
    s += "#"
    s += sgl.gen("after", **NAMING)


C = FIRST_BYTE + ord("c")
CUTS = [
    # what the model says, the options, the text that remains
    pytest.param(":abcdef", {"stop": "d"}, "abc", id="one token"),
    pytest.param(":abcdef", {"stop": "cde"}, "ab", id="several tokens"),
    pytest.param(":abcdef", {"stop": "abc"}, "", id="everything"),
    pytest.param(":abcdef", {"stop": ["ef", "bcX"]}, "abcd", id="held back, then shown"),
    pytest.param(":abécd", {"stop": "é"}, "ab", id="a character of two tokens"),
    pytest.param(":abécd", {"stop": "éc"}, "ab", id="from a character of two tokens"),
    pytest.param(":abécd", {"stop": "c"}, "abé", id="behind a character of two tokens"),
    pytest.param(":a中bc", {"stop": "中b"}, "a", id="a character of three tokens"),
    pytest.param(":ab<think>cd", {"stop": "ink"}, "ab<th", id="inside a token"),
    pytest.param(":ab<think>cd", {"stop": "ink>c"}, "ab<th", id="from inside a token"),
    pytest.param(":ab<think>cd", {"stop": "b<th"}, "a", id="into a token"),
    pytest.param(":ab" + EOS + "cd", {}, "ab", id="end of sentence"),
    pytest.param(":abé" + EOS + "cd", {}, "abé", id="end of sentence behind a character of two tokens"),
    pytest.param(":abcd", {"stop_token_ids": [C]}, "ab", id="a stop token"),
    pytest.param(":abcd", {"max_tokens": 2}, "ab", id="length"),
]


@pytest.mark.parametrize(("line", "options", "text"), CUTS)
def test_what_a_stop_cuts_off_is_not_in_the_history(line: str, options: dict[str, Any], text: str) -> None:
    with reciting(line) as own:
        state = guarded(lambda: own.run(cut, options))
        assert state["x"] == text
        assert tokens_before(state, "after") == own.prompt(f"go:{text}#")


ODD = "\N{REPLACEMENT CHARACTER}"
BROKEN = [
    pytest.param(b":a\xe4bc", {"stop": "c"}, b"a\xe4b", id="before"),
    pytest.param(b":a\xe4bc", {"stop": "b"}, b"a\xe4", id="right before"),
    pytest.param(b":a\xe4bc", {"stop": ODD}, b"a", id="the broken character itself"),
    pytest.param(b":a\xe4bc", {"stop": f"a{ODD}b"}, b"", id="over it"),
    pytest.param(b":a\xe4\xb8bc", {"stop": "b"}, b"a\xe4\xb8", id="two bytes of three"),
    pytest.param(b":a\xe4\xb8bc", {"stop": f"{ODD}b"}, b"a", id="two bytes of three are the stop"),
    pytest.param(b":a\xff\xfebc", {"stop": "b"}, b"a\xff\xfe", id="no beginning of a character"),
    pytest.param(b":a\xff\xfebc", {"stop": f"{ODD}b"}, b"a\xff", id="one of two is the stop"),
    pytest.param(b":ab\xe4cd", {"max_tokens": 3}, b"ab\xe4", id="length, inside of a character"),
    pytest.param(
        b":ab\xe4cd", {"stop_token_ids": [FIRST_BYTE + ord("c")]}, b"ab\xe4", id="a stop token behind it"
    ),
]


@pytest.mark.parametrize(("line", "options", "kept"), BROKEN)
def test_what_is_not_utf8_goes_on_with_its_tokens(line: bytes, options: dict[str, Any], kept: bytes) -> None:
    with reciting(line) as own:
        state = guarded(lambda: own.run(cut, options))
        assert state["x"] == kept.decode(errors="replace")
        before = [*own.prompt("go:"), *(FIRST_BYTE + byte for byte in kept), FIRST_BYTE + ord("#")]
        assert tokens_before(state, "after") == before


def test_end_of_sentence_inside_of_a_character() -> None:
    """The text ends with a replacement character, the history with the byte, and EOS is in neither."""
    with reciting(b":a\xe4", [FIRST_BYTE + 0xE4, byte_tokenizer().eos]) as own:
        state = guarded(lambda: own.run(cut, {}))
        assert state["x"] == f"a{ODD}"
        before = [*own.prompt("go:a"), FIRST_BYTE + 0xE4, *own.engine.tokenizer.encode("#")]
        assert tokens_before(state, "after") == before


@pytest.mark.parametrize("stream", [False, True])
def test_babble_goes_on_with_its_tokens(stream: bool) -> None:
    """Random weights say much that is not UTF-8."""

    @sgl.function
    def program(s: Any) -> None:
        s += "Speak! "
        s += sgl.gen("x", max_tokens=20, temperature=0, ignore_eos=True)
        s += " Go on: "
        s += sgl.gen("y", max_tokens=20, temperature=0, ignore_eos=True)
        s += "#" + sgl.gen("after", **NAMING)

    with rig() as own:
        state = program.run(backend=own.backend, stream=stream)
        text = guarded(lambda: "".join(state.text_iter()))
        first = own.complete("Speak! ", max_tokens=20, ignore_eos=True)
        assert ODD in first.text
        tokens = [*own.prompt("Speak! "), *first.tokens, *own.engine.tokenizer.encode(" Go on: ")]
        second = own.complete(tokens, max_tokens=20, ignore_eos=True)
        assert (state["x"], state["y"]) == (first.text, second.text)
        assert text == f"Speak! {first.text} Go on: {second.text}#{state['after']}"
        assert tokens_before(state, "after") == [*tokens, *second.tokens, FIRST_BYTE + ord("#")]


# -- with and without KV -----------------------------------------------------------------------------------


@sgl.function
def everything(s: Any) -> None:
    """Turns, forks, a choice, stops and babble; all gens name their tokens."""
    gen: dict[str, Any] = {**NAMING, "max_tokens": 7}
    s += sgl.system("Speak.") + sgl.user("One?")
    s += sgl.assistant(sgl.gen("a", **gen))
    s += sgl.user("Two?")
    s.sync()
    children = s.fork(3)
    children += lambda i: sgl.assistant(f"{i}: " + sgl.gen("b", **{**gen, "stop": [ODD, "a"]}))
    children += lambda i: sgl.user("Really?") + sgl.assistant(sgl.gen("c", **gen))
    s["before"] = [[tokens_before(child, name) for name in "bc"] for child in children]
    s["texts"] = [child.text() for child in children]
    children.join()
    s += sgl.assistant("Best: " + sgl.select("d", ["0", "1", "2"]) + sgl.gen("e", **gen))


def observed(state: Any) -> Any:
    last = [tokens_before(state, name) for name in "ae"]
    return state.text(), [state[name] for name in "abcde"], state["texts"], state["before"], last


def _flushing(own: Rig) -> None:
    """Forget all KV before every call."""
    generate, select = own.backend.generate, own.backend.select

    def flushed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            own.backend.flush_cache()
            return call(*args, **kwargs)

        return run

    own.backend.generate, own.backend.select = flushed(generate), flushed(select)


def test_results_do_not_depend_on_held_kv() -> None:
    with rig() as own:
        expected = observed(guarded(lambda: own.run(everything)))
        assert observed(guarded(lambda: own.run(everything))) == expected  # now everything is known
        sgl.flush_cache(own.backend)
        assert observed(guarded(lambda: own.run(everything))) == expected
    with rig() as own:
        _flushing(own)
        assert observed(guarded(lambda: own.run(everything))) == expected
    for slots in (4, 3):  # 3: what a select takes
        few = dataclasses.replace(POOLS, slots=slots)
        with open_engine(babbling_model(), few) as engine, rig(engine) as own:
            assert observed(guarded(partial(own.run, everything))) == expected, slots


def test_kv_is_reused_until_it_is_flushed() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "A rather long beginning. " + sgl.gen("x", max_tokens=4, temperature=0)

    with rig() as own:
        whole = len(own.prompt("A rather long beginning. "))

        def cached() -> int:
            return int(guarded(lambda: own.run(program)).get_meta_info("x")["cached_tokens"])

        assert [cached(), cached()] == [0, whole]
        own.backend.flush_cache()
        assert [cached(), cached()] == [0, whole]


@pytest.mark.parametrize(("stop", "text"), [("d", "abc"), ("cdef", "ab")])
def test_a_stop_does_not_cost_the_prompt(stop: str, text: str) -> None:
    """KV that went too far is of no use, that of the prompt is."""
    with reciting(":abcdefgh") as own:
        state = guarded(lambda: own.run(cut, {"stop": stop}))
        assert state["x"] == text
        kept = len(own.prompt("go:" + (text if stop == "d" else "")))
        assert state.get_meta_info("after")["cached_tokens"] == kept


# -- the beginning of a text -------------------------------------------------------------------------------


@sgl.function
def naming(s: Any, text: str) -> None:
    s += text
    s += sgl.gen("x", **NAMING)


@pytest.mark.parametrize("before", [None, "", BOS, "Hello", f"{BOS}Hello"])
def test_bos_is_there_once(before: str | None) -> None:
    """Whether a text spells it out or not, and whatever was run before."""
    with rig() as own:
        if before is not None:
            guarded(lambda: own.run(naming, before))
        for text in ("Hello you", f"{BOS}Hello you"):
            state = guarded(partial(own.run, naming, text))
            assert tokens_before(state, "x") == own.prompt("Hello you")


def test_select_at_the_very_beginning() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.select("pick", ["yes", "no"])
        s += sgl.gen("x", **NAMING)

    with rig() as own:
        state = guarded(lambda: own.run(program))
        assert tokens_before(state, "x") == own.prompt(state["pick"])
        assert tokens_before(guarded(lambda: own.run(naming, f"{BOS}a")), "x") == own.prompt("a")


def test_special_tokens_in_texts_and_choices() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += f"{USER}a" + sgl.select("pick", [f"{THINK_END}b"]) + f"c{EOS}" + sgl.gen("x", **NAMING)

    with rig() as own:
        state = guarded(lambda: own.run(program))
        assert tokens_before(state, "x") == own.prompt(f"{USER}a{THINK_END}bc{EOS}")
        assert len(own.prompt(f"{USER}a{THINK_END}bc{EOS}")) == 7
