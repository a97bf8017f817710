"""Scoring asks every turn behind the right history, and counts what the engine really answers."""

from __future__ import annotations

import asyncio
import dataclasses
from itertools import groupby
from operator import itemgetter

import pytest

from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.config import preset
from weft.runtime.embedded import scoring
from weft.runtime.embedded.data import TASKS, judge_reply
from weft.runtime.embedded.dialogue import Example
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.embedded.encoding import encode
from weft.runtime.embedded.scoring import held_out, score_loops, score_turns, turns
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.model.model import Model
from weft.runtime.text.chat import render
from weft.runtime.text.chat_output import parse
from weft.runtime.text.tokenizer import Tokenizer

CONFIG = dataclasses.replace(preset("tiny"), vocab_size=2048)
TOKENS = Tokenizer.load(TOKENIZER)


def engine() -> Engine:
    sizes = PoolSizes(tokens=8192, slots=8, context=4096, burst=256)
    config = EngineConfig(pools=sizes, limits=CoreLimits(chunk=256))
    return Engine(Model(CONFIG, dummy_weights(CONFIG, 0)), TOKENS, config)


def test_random_weights_answer_nothing_and_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_PARAMS", scoring._PARAMS.__class__(max_tokens=8, temperature=0))
    examples = [example for task in ("copy", "route") for example in held_out(task, 3)]
    with engine() as own:
        together = asyncio.run(score_turns(own, examples, together=4))
        alone = asyncio.run(score_turns(own, examples, together=1))
        assert asyncio.run(score_loops(own, held_out("calculator", 2))).right == 0
    assert {task: score.asked for task, score in together.items()} == {
        task: sum(example.task == task for example, _ in turns(examples)) for task in ("copy", "route")
    }
    assert all(score.share == 0 for score in together.values())
    assert {task: score.replies for task, score in together.items()} == {
        task: score.replies for task, score in alone.items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_expected_reply_is_right_and_half_of_it_is_not(task: str) -> None:
    for example in held_out(task, 5):
        for scored, text in zip(example.scored, replies(example), strict=True):
            prompt = render(TOKENS, example.messages[: scored.turn], thinking=scored.thinking, tools=example.tools)
            assert judge_reply(example, scored, parse(text, prompt.form))
            assert not judge_reply(example, scored, parse(text[: len(text) // 2], prompt.form))


def replies(example: Example) -> list[str]:
    """What each assistant turn draws, its EOS left out."""
    tokens, learn = encode(TOKENS, example)
    runs = [
        [token for token, _ in run]
        for learnt, run in groupby(zip(tokens, learn, strict=True), itemgetter(1))
        if learnt
    ]
    return [TOKENS.decode(run[:-1]) for run in runs]
