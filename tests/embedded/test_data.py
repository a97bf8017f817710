"""The made dialogues: laid out as the product does, right, and split as stated."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.runtime.embedded import data
from weft.runtime.embedded.data import TASKS, Example, Scored, judge_reply, make, mixture, run_tool
from weft.runtime.embedded.encoding import encode, segments
from weft.runtime.embedded.make_tokenizer import FILE
from weft.runtime.embedded.tasks import agents, arithmetic, facts, lists, records
from weft.runtime.embedded.words import ATTRIBUTES, VALUES, Draw, Split, heldout, number_key, pair_key
from weft.runtime.text import chat
from weft.runtime.text.chat_output import Reply, parse
from weft.runtime.text.tokenizer import Tokenizer, byte_tokenizer

TOKENIZER = Tokenizer.load(FILE)
SPLITS: tuple[Split, ...] = ("train", "heldout")


def examples(task: str, split: Split, count: int, **options: Any) -> Iterator[Example]:
    return (make(task, split, random.Random(f"{task} {split} {i}"), **options) for i in range(count))


def text(example: Example) -> str:
    return "\n".join(part for part, control in segments(example) if not control)


def prompt(example: Example) -> str:
    return "\n".join(message["content"] for message in example.messages if message["role"] == "user")


def drawn(tokenizer: Tokenizer, example: Example, scored: Scored) -> str:
    """The text of a turn, as the model draws it."""
    tokens, learn = encode(tokenizer, example)
    turns = [list(run) for learned, run in itertools.groupby(range(len(tokens)), learn.__getitem__) if learned]
    *said, end = (tokens[i] for i in turns[example.scored.index(scored)])
    assert end == tokenizer.eos
    return tokenizer.decode(said)


# -- layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_tokenizer()], ids=["embedded", "bytes"])
@settings(max_examples=120)
@given(task=st.sampled_from(TASKS), split=st.sampled_from(SPLITS), seed=st.integers(0, 1 << 30))
def test_every_turn_stands_behind_the_products_own_prompt(
    tokenizer: Tokenizer, task: str, split: Split, seed: int
) -> None:
    example = make(task, split, random.Random(seed))
    tokens, learn = encode(tokenizer, example)
    learned: list[int] = []
    for scored in example.scored:
        before = example.messages[: scored.turn]
        rendered = chat.render(tokenizer, before, thinking=scored.thinking, tools=example.tools)
        begin = len(rendered.tokens)
        assert tokens[:begin] == rendered.tokens
        end = tokens.index(tokenizer.eos, begin) + 1
        learned += range(begin, end)
        reply = parse(tokenizer.decode(tokens[begin : end - 1]), rendered.form)
        assert judge_reply(example, scored, reply)
    assert [i for i, flag in enumerate(learn) if flag] == learned
    assert len(tokens) == len(learn) == learned[-1] + 1
    assert [scored.turn for scored in example.scored] == [
        i for i, message in enumerate(example.messages) if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("task", TASKS)
def test_turns_that_think_are_those_v4_shows_the_reasoning_of(task: str) -> None:
    seen = set()
    for example in examples(task, "train", 60):
        thinks = [scored.thinking for scored in example.scored]
        assert thinks == (
            [example.thinking] * len(thinks) if example.tools else [*[False] * (len(thinks) - 1), example.thinking]
        )
        seen.add(example.thinking)
    assert seen == {True, False}


# -- answers -----------------------------------------------------------------------------------------------


def reply_to(example: Example, scored: Scored) -> Reply:
    form = chat.render(
        TOKENIZER, example.messages[: scored.turn], thinking=scored.thinking, tools=example.tools
    ).form
    return parse(drawn(TOKENIZER, example, scored), form)


def test_wrong_replies_are_told_from_right_ones() -> None:
    for task in TASKS:
        for example in examples(task, "heldout", 5):
            for scored in example.scored:
                right = reply_to(example, scored)
                assert judge_reply(example, scored, right)
                empty = Reply(None, "", [], "stop")
                assert not judge_reply(example, scored, empty)
                if scored.answer is not None:
                    assert not judge_reply(example, scored, Reply(None, right.content + "0", [], "stop"))
                    continue
                (call,) = right.tool_calls
                assert not judge_reply(example, scored, Reply(None, "", [call, call], "tool_calls"))
                assert not judge_reply(example, scored, Reply(None, "", [call], "length"))
                call.arguments = call.arguments.replace('": "', '": "0')
                assert not judge_reply(example, scored, right)


@pytest.mark.parametrize("task", data.TOOL_TASKS)
def test_tools_return_what_the_dialogue_says(task: str) -> None:
    for example in examples(task, "heldout", 40):
        for i, message in enumerate(example.messages):
            for call in message.get("tool_calls", ()):
                function = call["function"]
                assert example.messages[i + 1]["content"] == run_tool(
                    example, function["name"], function["arguments"]
                )


def test_tools_refuse_what_they_cannot_do() -> None:
    example = next(examples("route", "train", 1))
    name = example.tools[-1]["function"]["name"]
    assert run_tool(example, "no_such", "{}") == "error: no such tool"
    assert run_tool(example, name, '{"name": "Nobody"}') == "error: not found"
    calculator = next(examples("calculator", "train", 1))
    assert run_tool(calculator, "calculator", '{"expression": "12 * 12"}') == "144"
    for bad in ('{"expression": "2 ** 9"}', '{"expression": 3}', "{}"):
        assert run_tool(calculator, "calculator", bad) == "error: not an expression"


def answers(example: Example, task: str) -> Iterator[tuple[str, str]]:
    """The user's text and the expected answer, of each turn of the task."""
    for scored in example.scored:
        if scored.task == task:
            assert scored.answer is not None
            yield example.messages[scored.turn - 1]["content"], scored.answer


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_prompts(split: Split) -> None:
    for example in examples("addition", split, 200, plain=True):
        (asked, answer), *more = answers(example, "addition")
        found = re.search(r"\d+ [-+*] \d+", asked)
        assert found and str(eval(found[0])) == answer
        for (_, before), (later, then) in itertools.pairwise([(asked, answer), *more]):
            assert int(then) == int(before) + int(re.findall(r"\d+", later)[0])
    for example in examples("sort", split, 100, plain=True):
        for asked, answer in answers(example, "sort"):
            words = answer.split(", ")
            assert sorted(words) == sorted(next(filter(None, re.findall(r"(?:\w+, )+\w+", asked))).split(", "))
            values = [int(word) if word.isdigit() else word for word in words]
            assert values == sorted(values, reverse="from big" in asked)  # type: ignore[type-var]
    for example in examples("count", split, 100, plain=True):
        for asked, answer in answers(example, "count"):
            listed = re.search(r"(?:\w+, )+\w+", asked)
            assert listed
            items = listed[0].split(", ")
            kind = re.search(rf"(?:Count|is|times) ({'|'.join(VALUES)})\b", asked.replace(listed[0], ""))
            assert answer == str(items.count(kind[1]) if kind else len(items))
    for example in examples("copy", split, 50, plain=True):
        assert all(answer in asked for asked, answer in answers(example, "copy"))


@pytest.mark.parametrize("split", SPLITS)
def test_extracted_values_are_those_of_the_json(split: Split) -> None:
    for example in examples("json_extract", split, 100, plain=True):
        context = prompt(example)
        body = re.search(r"\[\{.*\}\]|\{.*?\}", context, re.DOTALL)
        assert body
        read = json.loads(body[0])
        rows = {row["name"]: row for row in (read if isinstance(read, list) else [read])}
        for asked, answer in answers(example, "json_extract"):
            line = asked.rpartition("\n")[2]
            row = next((row for name, row in rows.items() if name in line), next(iter(rows.values())))
            (key,) = (key for key in row if re.search(rf"\b{key}\b", line))
            assert answer == str(row[key])


@pytest.mark.parametrize("task", ["recall", "two_hop"])
@pytest.mark.parametrize("tokens", [None, 400, 4096])
def test_asked_values_have_no_nearer_repeat(task: str, tokens: int | None) -> None:
    for example in examples(task, "heldout", 5 if tokens else 40, tokens=tokens, plain=True):
        context = example.messages[example.scored[0].turn - 1]["content"].rpartition("\n")[0]
        for scored in example.scored:
            question = example.messages[scored.turn - 1]["content"].rpartition("\n")[2]
            (name,) = set(re.findall(r"\b[A-Z]\w{3,}", question)) & set(re.findall(r"\w+", context))
            assert len(re.findall(rf"\b{name}\b", context)) == 1
            if task == "recall":
                assert len(re.findall(rf"\b{scored.answer}\b", context)) == 1


# -- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", data.LONG_TASKS)
@pytest.mark.parametrize("tokens", [1000, 4096, 8192])
def test_long_examples_are_as_long_as_asked(task: str, tokens: int) -> None:
    for split in SPLITS:
        for example in examples(task, split, 3, tokens=tokens, plain=True):
            assert 0.86 * tokens <= len(encode(TOKENIZER, example).tokens) <= tokens


def test_the_first_recalled_fact_is_at_the_beginning() -> None:
    for example in examples("recall", "heldout", 10, tokens=2000, plain=True):
        context = example.messages[example.scored[0].turn - 1]["content"]
        assert example.scored[0].answer is not None
        assert re.search(rf"\b{example.scored[0].answer}\b", context[:60])


@pytest.mark.parametrize("max_tokens", [64, 300, 3000])
def test_a_mixture_keeps_its_limit_and_repeats_itself(max_tokens: int) -> None:
    def some(seed: int, count: int, **part: int) -> list[Example]:
        made = list(itertools.islice(mixture(TOKENIZER, "train", seed, max_tokens, **part), count))
        assert all(encode(TOKENIZER, example) == encoded for example, encoded in made)
        assert all(len(encoded.tokens) <= max_tokens for _, encoded in made)
        return [example for example, _ in made]

    whole = some(0, 60)
    assert some(0, 60) == whole
    assert some(1, 60) != whole
    parts = [some(0, 20, worker=worker, workers=3) for worker in range(3)]
    assert [example for three in zip(*parts, strict=True) for example in three] == whole
    if max_tokens > 64:
        assert len({example.task for example in whole}) > 8


# -- splits ------------------------------------------------------------------------------------------------


def test_held_out_templates_are_others() -> None:
    pairs = 0
    for module in (agents, arithmetic, facts, lists, records, data):
        for name, held in vars(module).items():
            if "HELD_" not in name or (module is records and name == "HELD_QUESTIONS"):
                continue
            base = name.replace("HELD_", "")
            train = getattr(module, base, None) or getattr(module, base.lstrip("_"))
            for ours, theirs in zip(_phrases(held), _phrases(train), strict=True):
                assert ours and not {_shape(phrase) for phrase in ours} & {_shape(phrase) for phrase in theirs}
                pairs += 1
    assert pairs > 20


def _phrases(templates: Any) -> list[tuple[str, ...]]:
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def _shape(phrase: str) -> str:
    return re.sub(r"\{\w\}", "{}", phrase)


@pytest.mark.parametrize("split", SPLITS)
def test_values_belong_to_their_split(split: Split) -> None:
    held = split == "heldout"
    common = {
        word
        for task in TASKS
        for e in examples(task, "train", 1)
        for word in re.findall("[a-z]+", text(e).lower())
    }
    fixed = {*VALUES, *ATTRIBUTES}
    names: set[str] = set()
    for task in TASKS:
        for example in examples(task, split, 40):
            names |= set(re.findall(r"\b[A-Z][a-z]{3,}", " ".join(example.data.get("get_friend", {}))))
            if task == "recall":
                names |= set(re.findall(r"of ([A-Z]\w+)", prompt(example)))
                assert all(
                    heldout(number_key(int(n))) == held
                    for n in re.findall(r"\b\d{3,}\b", prompt(example))
                    if "add" not in prompt(example) and not re.search(r"\d [-+*] \d", prompt(example))
                )
            if task in ("addition", "calculator"):
                for a, sign, b in re.findall(r"(\d+) ([-+]) (\d+)", prompt(example)):
                    assert (
                        heldout(pair_key(int(a), int(b))) == held
                        or int(a) < 10
                        or f"{a} {sign} {b} =" in prompt(example)
                    )
    assert len(names - common - fixed) > 50
    assert all(heldout(name.lower()) == held for name in names)


@given(seed=st.integers(0, 1 << 30), split=st.sampled_from(SPLITS))
def test_draws_belong_to_their_split(seed: int, split: Split) -> None:
    draw = Draw(split, random.Random(seed))
    held = split == "heldout"
    words = [draw.word() for _ in range(20)]
    assert len(set(words)) == 20
    assert all(heldout(word) == held for word in words)
    assert heldout(number_key(draw.number(3))) == held
    assert heldout(pair_key(*draw.pair(2, 3))) == held


def test_held_out_dialogues_are_made_of_tokens_the_train_split_has() -> None:
    def used(split: Split, count: int) -> set[int]:
        return {id for task in TASKS for e in examples(task, split, count) for id in encode(TOKENIZER, e).tokens}

    assert used("heldout", 40) - used("train", 250) == set()


def test_chance_is_what_the_most_frequent_answer_scores() -> None:
    for task in TASKS:
        given = [
            scored.answer
            for e in examples(task, "heldout", 250, plain=True)
            for scored in e.scored
            if scored.task == task
        ]
        most = max(given.count(answer) for answer in {*given} - {None}) / len(given)
        assert abs(most - data.chance(task)) < 0.05, (task, most)


def test_data_does_not_load_torch() -> None:
    code = "import sys, weft.runtime.embedded.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
