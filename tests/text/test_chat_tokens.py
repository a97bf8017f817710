"""Tokens of a prompt: against deepseek-recipe's own encoder, and those of turns that the model drew."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe as recipe
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from support.chat import (
    ASSISTANT,
    BOS,
    EOS,
    TOOLS,
    USER,
    assistant,
    byte_tokenizer,
    call,
    merging_json,
    result,
    system,
    user,
)
from weft.runtime.errors import CheckpointError, RequestError
from weft.runtime.text.chat import Prompt, encode, render
from weft.runtime.text.chat_request import convert
from weft.runtime.text.tokenizer import Tokenizer, byte_tokenizer_json
from weft.runtime.text.tokens import LEADING, TRAILING

# -- tokens ------------------------------------------------------------------------------------------------

SPELLINGS = st.sampled_from([*LEADING, *TRAILING, "<｜ref｜>", "<｜/box｜>", "<｜System｜>"])
TEXTS = st.lists(SPELLINGS | st.text("ab1 <｜>é中\n", max_size=5), max_size=5).map("".join)
ARGUMENTS = st.dictionaries(TEXTS.filter(lambda name: '"' not in name), TEXTS | st.integers(), max_size=2)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [system(draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages.append(user(draw(TEXTS)))
        ids = draw(st.lists(st.sampled_from("xyz"), unique=True, max_size=2))
        calls = [call(id, "f", json.dumps(draw(ARGUMENTS), ensure_ascii=False)) for id in ids]
        messages.append(assistant(draw(TEXTS), draw(st.none() | TEXTS), tool_calls=calls or None))
        messages += [result(id, draw(TEXTS)) for id in ids]
    return [*messages, user(draw(TEXTS))]


@pytest.mark.parametrize("vocabulary", ["bytes", "merging"])
@given(messages=histories(), thinking=st.booleans(), tools=st.sampled_from([[], TOOLS]))
def test_tokens_are_those_of_the_recipes_encoder(
    vocabulary: str, messages: list[dict[str, Any]], thinking: bool, tools: list[dict[str, Any]]
) -> None:
    text = byte_tokenizer_json() if vocabulary == "bytes" else merging_json()
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text))
    prompt = render(tokenizer, messages, thinking=thinking, tools=tools, generation="0731")
    request = convert(
        messages, thinking=thinking, effort=None, tools=tools, tool_choice="auto", response_format=None
    )
    theirs = recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_str(text))
    rendered = theirs.render_conversation(request.conversation)
    assert prompt.text == rendered.prompt
    if all(rendered.prompt[a:b] in (*LEADING, *TRAILING) for a, b in rendered.special_ranges):
        assert prompt.tokens == theirs.encode(request.conversation)
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert tokenizer.decode(prompt.tokens[-prompt.opening :]) == ("<think>" if thinking else "</think>")


@pytest.mark.parametrize("token", [*LEADING, *TRAILING])
def test_a_special_token_spelled_in_any_field_stays_text(token: str) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": token, "parameters": {"type": "object", token: token}},
        }
    ]
    calls = [call("x", "f", json.dumps({token: token}, ensure_ascii=False))]

    def specials(text: str) -> list[int]:
        messages = [
            system(text),
            {"role": "latest_reminder", "content": text},
            user(text),
            assistant(text, text, tool_calls=calls),
            result("x", text),
            user(text),
        ]
        prompt = render(byte_tokenizer(), messages, thinking=True, tools=tools)
        return [id for id in prompt.tokens if not 3 <= id < 3 + 256]

    assert specials(f"{token}a{token}") == specials("plain")


def test_plain_text_of_every_kind() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(merging_json()))
    specials = {tokenizer.encode(token)[0] for token in (*LEADING, *TRAILING)}
    for text in ("", "no special", "<think>", f"a {USER}{BOS} b</think", "".join(TRAILING)):
        ids = tokenizer.encode_plain(text)
        assert specials.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_plain("no special") == tokenizer.encode("no special")


def test_a_tokenizer_whose_merges_build_a_special_token_is_refused() -> None:
    raw = json.loads(byte_tokenizer_json())
    raw["model"]["vocab"]["ab"] = len(raw["model"]["vocab"])
    raw["model"]["merges"] = [["a", "b"]]
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": raw["model"]["vocab"]["ab"], "content": "ab"})
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(raw)))
    with pytest.raises(CheckpointError, match="merges"):
        tokenizer.encode_plain("cab")


def test_a_tokenizer_without_a_token_of_the_layout() -> None:
    raw = json.loads(byte_tokenizer_json())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != ASSISTANT]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(raw)))
    with pytest.raises(CheckpointError, match="lacks the token <｜Assistant｜>"):
        render(tokenizer, [user("Hi")], thinking=False)


# -- turns that were drawn ---------------------------------------------------------------------------------

# Splits of "Hello" that the tokenizer itself never makes.
REASON, ANSWER = [3 + b for b in b"why"], [200, 201, 3 + 0xE4, 7]


def drawn_prompt(messages: list[dict[str, Any]], *drawn: list[int] | None, **options: Any) -> Prompt:
    return render(byte_tokenizer(), messages, drawn=drawn, **options)


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def test_a_drawn_turn_keeps_its_tokens() -> None:
    first = render(byte_tokenizer(), [user("Hi")], thinking=False)
    turn = [*first.tokens[-first.opening :], *ANSWER, 1]
    prompt = drawn_prompt([user("Hi"), assistant("whatever"), user("Bye")], turn, thinking=False)
    assert prompt.tokens == [*first.tokens, *ANSWER, *ids(f"{EOS}{USER}Bye{ASSISTANT}</think>")]
    unfinished = drawn_prompt([user("Hi"), assistant("whatever"), user("Bye")], turn[:-1], thinking=False)
    assert unfinished.tokens == prompt.tokens


def test_a_drawn_thinking_turn_loses_its_reasoning_or_keeps_it_as_it_was_drawn() -> None:
    turn = [*ids("<think>"), *REASON, *ids("</think>"), *ANSWER, 1]
    history = [user("Hi"), assistant("Hello", "why"), user("Bye")]
    tail = ids(f"{EOS}{USER}Bye{ASSISTANT}<think>")
    dropped = drawn_prompt(history, turn, thinking=True)
    assert dropped.tokens == [*ids(f"{BOS}{USER}Hi{ASSISTANT}</think>"), *ANSWER, *tail]
    kept = drawn_prompt(history, turn, thinking=True, tools=TOOLS)
    head = ids(f"{USER}Hi{ASSISTANT}<think>")
    assert kept.tokens[-len([*head, *REASON, 0, *ANSWER, *tail]) :] == [
        *head, *REASON, *ids("</think>"), *ANSWER, *tail,
    ]  # fmt: skip


def test_a_turn_drawn_without_thinking_among_thinking_ones() -> None:
    turn = [*ids("</think>"), *ANSWER, 1]
    prompt = drawn_prompt([user("Hi"), assistant("Hello"), user("Bye")], turn, thinking=True, tools=TOOLS)
    tail = [*ids("<think></think>"), *ANSWER, *ids(f"{EOS}{USER}Bye{ASSISTANT}<think>")]
    assert prompt.tokens[-len(tail) :] == tail


def test_a_turn_cut_off_in_its_reasoning() -> None:
    turn = [*ids("<think>"), *REASON]
    history = [user("Hi"), assistant("", "why"), user("Bye")]
    assert drawn_prompt(history, turn, thinking=True).tokens == ids(
        f"{BOS}{USER}Hi{ASSISTANT}</think>{EOS}{USER}Bye{ASSISTANT}<think>"
    )
    kept = drawn_prompt(history, turn, thinking=True, tools=TOOLS).tokens
    tail = [*ids("<think>"), *REASON, *ids(f"</think>{EOS}{USER}Bye{ASSISTANT}<think>")]
    assert kept[-len(tail) :] == tail
    going_on = [user("Hi"), assistant("", "why", prefix=True)]
    assert drawn_prompt(going_on, turn, thinking=True).tokens == [*ids(f"{BOS}{USER}Hi{ASSISTANT}"), *turn]


def test_an_answer_behind_a_think_end_spelled_in_letters_is_encoded_from_its_text() -> None:
    """The parser reads text, so it saw an end that no token marks."""
    turn = [*ids("<think>"), *REASON, *byte_tokenizer().encode_plain("</think>"), *ANSWER]
    prompt = drawn_prompt([user("Hi"), assistant("Hello", "why"), user("Bye")], turn, thinking=True)
    assert prompt.tokens == ids(f"{BOS}{USER}Hi{ASSISTANT}</think>Hello{EOS}{USER}Bye{ASSISTANT}<think>")


def test_only_some_turns_drawn_and_a_continued_one() -> None:
    turn = [*ids("</think>"), *ANSWER]
    history = [user("1"), assistant("a"), user("2"), assistant("b"), user("3"), assistant("c", prefix=True)]
    prompt = drawn_prompt(history, None, turn, turn, thinking=False)
    assert prompt.tokens == [
        *ids(f"{BOS}{USER}1{ASSISTANT}</think>a{EOS}{USER}2{ASSISTANT}"), *turn,
        *ids(f"{EOS}{USER}3{ASSISTANT}"), *turn,
    ]  # fmt: skip
    assert prompt.opening == len(turn)


def test_drawn_turns_that_cannot_be() -> None:
    with pytest.raises(RequestError, match=r"drawn = 1: there are 0"):
        drawn_prompt([user("Hi")], [262], thinking=False)
    with pytest.raises(RequestError, match=r"drawn\[0\]"):
        drawn_prompt([user("Hi"), assistant("a"), user("b")], [5, 6], thinking=False)


def test_other_protocols_come_in_through_the_recipe() -> None:
    body = {"model": "DeepSeek-V4-Pro", "max_tokens": 5, "system": "S", "messages": [user("Hi")]}
    request = recipe.MessagesRequest(body).convert(recipe.ConversionOptions())
    assert encode(byte_tokenizer(), request, generation="april").text == f"{BOS}S{USER}Hi{ASSISTANT}<think>"
