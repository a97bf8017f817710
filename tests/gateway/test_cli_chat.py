"""`weft chat`: turns are what a cold engine makes of the same tokens, and continue from the KV that exists."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from support.cli import Cli, checkpoint
from support.engine import Gate, byte_tokenizer, finish, running, until
from weft.gateway.cli.chat import Chat
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.errors import ContextLengthError
from weft.runtime.text.chat import Prompt
from weft.runtime.text.chat_output import ReplyDelta

PARAMS = SamplingParams(max_tokens=24, seed=11)
THINK_START, THINK_END = (byte_tokenizer().encode(token)[0] for token in ("<think>", "</think>"))


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


class Watched(Chat):
    """Keeps the prompts it made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: list[Prompt] = []

    def _prompt(self) -> Prompt:
        self.prompts.append(super()._prompt())
        return self.prompts[-1]


def nothing(delta: ReplyDelta) -> None:
    pass


def counts(figures: str) -> tuple[int, ...]:
    """Prompt tokens, of them from KV, computed, generated."""
    return tuple(int(n) for n in re.findall(r"\d+", figures)[:4])


@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_each_turn_is_what_a_cold_engine_draws(thinking: bool) -> None:
    async def talk() -> None:
        with Watched(engine, PARAMS, thinking) as chat:
            for text in ("Hi", "Why so?", "中"):
                figures.append(counts(await chat.answer(text, nothing)))
        for prompt, drawn in zip(chat.prompts, chat.drawn, strict=True):
            cold = await other.generate(prompt.tokens, PARAMS)
            assert drawn == [*prompt.tokens[-prompt.opening :], *cold.tokens]
        prompts.extend(prompt.tokens for prompt in chat.prompts)
        turns.extend(chat.drawn)

    figures: list[tuple[int, ...]] = []
    prompts: list[list[int]] = []
    turns: list[list[int]] = []
    with running() as engine, running() as other:
        finish(talk())
    # The output is not UTF-8, so no text could have brought these tokens back.
    assert any(ids(byte_tokenizer().decode(turn)) != turn for turn in turns)
    for before, after, turn, (length, cached, computed, generated) in zip(
        prompts, prompts[1:], turns, figures[1:], strict=False
    ):
        kept = turn[1:] if turn[-1] != 1 else turn[1:-1]
        if thinking:  # drawn inside the reasoning, which is left out from the next turn on
            assert THINK_END not in turn
            assert after[: len(before) + 1] == [*before[:-1], THINK_END, 1]
            assert cached == len(before) - 1
        else:
            assert after[: len(before) + len(kept)] == [*before, *kept]
            assert cached == len(before) + len(turn) - 2  # but the last one drawn
        assert (length, computed) == (len(after), len(after) - cached + generated - 1)


def test_a_system_message_and_the_effort_come_first() -> None:
    async def talk() -> list[int]:
        with Watched(engine, PARAMS, True, "max") as chat:
            chat.messages.append({"role": "system", "content": "Be <think> brief."})
            await chat.answer("Hi", nothing)
        return chat.prompts[0].tokens

    with running() as engine:
        tokens = finish(talk())
    assert byte_tokenizer().decode(tokens).startswith("<｜begin▁of▁sentence｜>Reasoning Effort: Absolute maximum")
    assert byte_tokenizer().decode(tokens).endswith("\n\nBe <think> brief.<｜User｜>Hi<｜Assistant｜><think>")
    assert tokens.count(THINK_START) == 1


def cancelled_turn(chat: Chat, when: Callable[[], bool], gate: Gate) -> Any:
    async def turn() -> None:
        task = asyncio.create_task(chat.answer("Hi", nothing))
        await until(when)
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

    return turn()


def test_a_turn_cancelled_half_way_ends_there() -> None:
    async def talk() -> None:
        with Watched(engine, SamplingParams(max_tokens=500, seed=11)) as chat:
            await cancelled_turn(chat, lambda: len(gate.steps) > 8, gate)
            assert [message["role"] for message in chat.messages] == ["user", "assistant"]
            (drawn,) = chat.drawn
            cold = await other.generate(chat.prompts[0].tokens, SamplingParams(max_tokens=len(drawn), seed=11))
            assert drawn[1:] == cold.tokens[: len(drawn) - 1] and len(drawn) > 1
            chat.params = PARAMS
            await chat.answer("Go on", nothing)
            before = [*chat.prompts[0].tokens, *drawn[1:]]
            assert chat.prompts[1].tokens == [
                *before,
                *ids("<｜end▁of▁sentence｜><｜User｜>Go on<｜Assistant｜></think>"),
            ]
            assert chat.drawn[1][1:] == (await other.generate(chat.prompts[1].tokens, PARAMS)).tokens

    gate = Gate()
    with running(gate) as engine, running() as other:
        finish(talk())


def test_a_turn_cancelled_before_its_first_token_was_never_made() -> None:
    async def talk() -> None:
        with Watched(engine, PARAMS) as chat:
            gate.shut()
            await cancelled_turn(chat, lambda: len(gate.steps) > 0, gate)
            assert chat.messages == [] and chat.drawn == []
            await chat.answer("Hello", nothing)
            assert chat.prompts[1].tokens == ids("<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>")

    gate = Gate()
    with running(gate) as engine:
        finish(talk())


def test_the_last_turn_gets_what_room_there_is_and_the_next_none() -> None:
    async def talk() -> None:
        with Watched(engine, SamplingParams(max_tokens=500, seed=11, ignore_eos=True)) as chat:
            await chat.answer("Hi", nothing)
            assert len(chat.prompts[0].tokens) + len(chat.drawn[0]) - 1 == 64
            with pytest.raises(ContextLengthError, match="messages"):
                await chat.answer("More", nothing)
            assert [message["role"] for message in chat.messages] == ["user", "assistant"]

    with running(context=64) as engine:
        finish(talk())


# -- the command -------------------------------------------------------------------------------------------

OPTIONS = ("--max-tokens", 12, "--seed", 3)


def replies(lines: list[str], thinking: bool = False) -> list[tuple[str, str]]:
    """Reasoning and content of each turn, from the class that the command uses."""

    async def talk() -> list[tuple[str, str]]:
        with Chat(engine, SamplingParams(max_tokens=12, seed=3), thinking) as chat:
            for line in lines:
                await chat.answer(line, nothing)
        answers = [message for message in chat.messages if message["role"] == "assistant"]
        return [(answer["reasoning_content"] or "", answer["content"]) for answer in answers]

    with Engine.load(checkpoint()) as engine:
        return finish(talk())


def test_piped_lines_are_turns(weft: Cli) -> None:
    assert (
        weft("chat", "--model", checkpoint(), *OPTIONS, "--stats", stdin="Hi\n\n  \nWhy?\nlast without end") == 0
    )
    assert weft.out == "".join(f"{content}\n" for _, content in replies(["Hi", "Why?", "last without end"]))
    stats = [counts(line) for line in weft.err.splitlines() if line.startswith("[")]
    assert [generated for *_, generated in stats] == [12] * 3
    assert stats[0][1] == 0 and stats[1][1] == stats[0][0] + 11 and stats[2][1] == stats[1][0] + 11


def test_reasoning_is_shown_between_its_tokens(weft: Cli) -> None:
    assert weft("chat", "--model", checkpoint(), *OPTIONS, "--thinking", stdin="Hi\n") == 0
    ((reasoning, content),) = replies(["Hi"], thinking=True)
    assert weft.out == f"<think>{reasoning}</think>\n{content}\n"
    assert "[" not in weft.err


def test_nothing_said(weft: Cli) -> None:
    assert weft("chat", "--model", checkpoint(), *OPTIONS, stdin="") == 0
    assert weft.out == ""


def test_errors(weft: Cli) -> None:
    assert weft.fails("chat", "--model", checkpoint(), *OPTIONS, "--effort", "max").startswith("effort = 'max'")
    assert weft.fails("chat", "--model", checkpoint(), *OPTIONS, stdin="a\udcff\n").startswith("line = ")
    assert weft.fails("chat", "--model", checkpoint(), *OPTIONS, "--system", "a\udcff").startswith("system = ")
    assert weft.fails("chat", "--model", checkpoint(), *OPTIONS, "--temperature", "nan").startswith(
        "temperature = nan"
    )
