"""Where texts meet: tokens do not depend on how a constant text was cut, and generations can heal its last token.

With the embedded model's tokenizer, which has merges, over random weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import sglang as sgl
from hypothesis import given, settings
from hypothesis import strategies as st

from support.draw import random_weights
from support.programs import Rig
from weft.backend.borders import Border, encoded, given_back, shared
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.config import preset
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError
from weft.runtime.model.model import Model
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import ASSISTANT, BOS, USER

TEXT = "The capital of France is called Paris, and 1,234 people know it."
PIECES = st.lists(
    st.sampled_from(["The cap", "ital", " of", " ", "Fra", "nce", "1", "23", "é", USER, "is", "\n\n"])
)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    config = dataclasses.replace(preset("tiny"), vocab_size=tokenizer().size)
    model = Model(config, random_weights(config, 1))
    sizes = PoolSizes(tokens=4096, slots=8, context=512, burst=512)
    with Engine(model, tokenizer(), EngineConfig(pools=sizes)) as engine:
        yield Rig(engine, model)


def prompt_of(state: Any, name: str) -> list[int]:
    return [token for _, token, _ in state.get_meta_info(name)["input_token_logprobs"]]


NAMING: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "return_logprob": True, "logprob_start_len": 0}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PIECES, st.booleans())
def test_tokens_of_what_is_read_do_not_depend_on_cuts(pieces: list[str], drawn: bool) -> None:
    """Drawn tokens stay, whatever stands behind them."""
    own = tokenizer()
    text, tokens, border = "", [own.bos], Border(0, 1)
    if drawn:
        text = "Fran"
        tokens = [own.bos, *own.encode("F"), *own.encode("r"), *own.encode("an")]
        border = Border(len(text), len(tokens))
    start, before = text, tokens
    for piece in pieces:
        text += piece
        tokens, border = encoded(own, text, tokens, border)
    assert tokens == before + own.encode(text[len(start) :])
    assert own.decode(tokens) == BOS + text


@sgl.function
def forked(s: Any, at: list[int]) -> None:
    s += TEXT[: at[0]]
    (child,) = s.fork(1)
    child += TEXT[at[0] : at[1]]
    (grandchild,) = child.fork(1)
    grandchild += TEXT[at[1] :]
    grandchild += sgl.gen("x", **NAMING)
    s["x"] = grandchild["x"]
    s["tokens"] = prompt_of(grandchild, "x")


@pytest.mark.parametrize("at", [(6, 30), (12, 13), (30, 41), (43, 47), (20, 20)])
def test_a_fork_within_a_word_does_not_cut_it(rig: Rig, at: tuple[int, int]) -> None:
    state = rig.run(forked, list(at))
    assert state.error() is None
    assert state["tokens"] == rig.prompt(TEXT)
    assert state["x"] == rig.complete(TEXT, max_tokens=3).text


@sgl.function
def choosing(s: Any) -> None:
    s += USER + "Which one? The cap"
    s += sgl.select("x", ["ital", "tain", " of"])
    s += "." + sgl.gen("after", **NAMING)


def test_choices_are_joined_with_the_text(rig: Rig) -> None:
    """As SGLang scores them: from where the tokens of text and choice part from those of the text alone."""
    own = tokenizer()
    state = rig.run(choosing)
    text = USER + "Which one? The cap"
    whole = [rig.prompt(text + choice) for choice in ("ital", "tain", " of")]
    start = min(shared(rig.prompt(text), tokens) for tokens in whole)
    assert start < len(rig.prompt(text)), "the case is one where a choice joins the text"
    found = state.get_meta_info("x")["input_token_logprobs"]
    for entries, tokens in zip(found, whole, strict=True):
        assert [token for _, token, _ in entries] == tokens[start:]
        table = rig.logits(tokens).log_softmax(1)
        want = [float(table[i - 1, tokens[i]]) for i in range(start, len(tokens))]
        assert [logprob for logprob, _, _ in entries] == pytest.approx(want, abs=1e-4)
    assert prompt_of(state, "after") == [own.bos, *own.encode(text + state["x"] + ".")]


@sgl.function
def ending(s: Any, text: str, options: dict[str, Any]) -> None:
    s += text
    s += sgl.gen("x", max_tokens=6, temperature=0, **options)
    s += "." + sgl.gen("after", **NAMING)


def healing(rig: Rig) -> Rig:
    return Rig(rig.engine, rig.model, heal=True)


@pytest.mark.parametrize("text", ["The cap", "It is ", "The capital of Fra"])
def test_the_last_token_of_a_text_is_drawn_again_with_more(rig: Rig, text: str) -> None:
    """Of the tokens that begin with its text, or that its text begins with."""
    own = tokenizer()
    prompt = rig.prompt(text)
    last = own.decode(prompt[-1:])
    assert given_back(own, prompt, Border(0, 1)) == last
    healed = healing(rig)
    state = healed.run(ending, text, {})
    assert state.error() is None and state.text().startswith(text + state["x"])
    output = rig.complete(prompt[:-1], max_tokens=6, begins=last)
    assert own.decode(output.tokens) == last + output.text and state["x"] == output.text
    # By hand: the likeliest token that fits.
    row = rig.logits(prompt[:-1])[-1]
    fits = [i for i in range(own.size) if own.token_bytes(i).startswith(last.encode()) and not own.is_special(i)]
    fits += [i for i in range(own.size) if own.token_bytes(i) and last.encode().startswith(own.token_bytes(i))]
    assert output.tokens[0] == max(set(fits), key=lambda i: (float(row[i]), -i))
    # What was drawn stays as it is; the full stop behind it is taken back in its turn.
    assert prompt_of(state, "after") == [*prompt[:-1], *output.tokens]
    healed.backend.shutdown()


def test_nothing_is_healed_behind_special_or_drawn_tokens_or_without_being_asked(rig: Rig) -> None:
    own = tokenizer()
    for text in (USER + "Hi" + ASSISTANT, "It ends here. é"):
        tokens, border = encoded(own, text)
        if text.endswith(ASSISTANT):
            assert given_back(own, tokens, border) == ""
    assert given_back(own, [own.bos, 300], Border(5, 2)) == ""
    assert given_back(own, rig.prompt("Count: 1"), Border(0, 1)) == "", "no token goes on behind a digit"
    state = rig.run(ending, "The cap", {})
    assert state["x"] == rig.complete("The cap", max_tokens=6).text


def test_healing_with_stops_lengths_and_streams(rig: Rig) -> None:
    healed = healing(rig)
    whole = healed.run(ending, "The cap", {})["x"]
    assert len(whole) > 3
    stopped = healed.run(ending, "The cap", {"stop": whole[2]})["x"]
    assert stopped == whole[: whole.index(whole[2])]
    streamed = ending.run("The cap", {}, backend=healed.backend, stream=True)
    assert "".join(streamed.text_iter("x")) == whole
    several = healed.run(ending, "The cap", {"n": 2})["x"]
    assert several == [whole, whole]
    healed.backend.shutdown()


@pytest.mark.parametrize("drafts", [1, 4])
def test_healing_is_the_same_with_drafts(rig: Rig, drafts: int) -> None:
    params = SamplingParams(max_tokens=8, seed=3, begins="The capital", ignore_eos=True)
    plain = asyncio.run(rig.engine.generate(rig.prompt("So: "), params))
    config = EngineConfig(pools=PoolSizes(tokens=2048, slots=4, context=512, burst=512))
    limits = dataclasses.replace(config.limits, drafts=drafts)
    with Engine(rig.model, tokenizer(), dataclasses.replace(config, limits=limits)) as engine:
        assert asyncio.run(engine.generate(rig.prompt("So: "), params)).tokens == plain.tokens
    assert tokenizer().decode(plain.tokens).startswith("The capital")


def test_a_beginning_and_a_grammar_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="begins"):
        SamplingParams(begins="a", grammar=Grammar("regex", "a")).validate()
