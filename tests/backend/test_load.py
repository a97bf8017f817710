"""Many programs on little memory: every one is answered, and as if it were alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sglang as sgl
from sglang.lang.choices import unconditional_likelihood_normalized

from support.engine import wait_for
from support.programs import POOLS, Rig, babbling_model, guarded, open_engine, rig, shared_engine
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError

GEN = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@sgl.function
def ask(s: Any, question: str, **options: Any) -> None:
    s += "Question: " + question
    s += sgl.gen("x", **{**GEN, **options})


@contextmanager
def small(slots: int = 8, **options: Any) -> Iterator[Rig]:
    pools = dataclasses.replace(POOLS, slots=slots, context=512)
    with open_engine(babbling_model(), pools) as engine, rig(engine, **options) as own:
        yield own


def alone(*questions: str, **params: Any) -> list[str]:
    """What an engine with much room says to each."""
    engine = shared_engine()

    async def complete(question: str) -> str:
        tokens = [engine.tokenizer.bos, *engine.tokenizer.encode(f"Question: {question}")]
        return (await engine.generate(tokens, SamplingParams(**{**GEN, **params}))).text

    async def all_of_them() -> list[str]:
        return list(await asyncio.gather(*map(complete, questions)))

    return asyncio.run(all_of_them())


# -- few slots ---------------------------------------------------------------------------------------------


def test_more_items_than_slots() -> None:
    questions = [f"number {i}?" for i in range(50)]
    with small() as own:
        states = guarded(lambda: ask.run_batch([{"question": q} for q in questions], backend=own.backend))
        assert [state.error() for state in states] == [None] * 50
        assert [state["x"] for state in states] == alone(*questions)


def test_more_of_the_same_than_slots() -> None:
    with small() as own:
        states = guarded(lambda: ask.run_batch([{"question": "same?"}] * 50, backend=own.backend))
        assert [state.error() for state in states] == [None] * 50
        assert {state["x"] for state in states} == set(alone("same?"))


def test_more_children_than_slots() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Question: "
        s.sync()
        children = s.fork(20)
        children += lambda i: f"child {i}?" + sgl.gen("x", **GEN)
        children.join()

    with small() as own:
        state = guarded(lambda: own.run(program))
        assert state["x"] == alone(*[f"child {i}?" for i in range(20)])


def test_several_completions_each_on_few_slots() -> None:
    """Together they want 24 slots of 8, and each gets all of its own before it begins."""
    with small() as own:
        batch = [{"question": f"number {i}?"} for i in range(8)]

        @sgl.function
        def program(s: Any, question: str) -> None:
            s += "Question: " + question + sgl.gen("x", n=3, **GEN)

        states = guarded(lambda: program.run_batch(batch, backend=own.backend))
        assert [state.error() for state in states] == [None] * 8
        assert [state["x"] for state in states] == [[x] * 3 for x in alone(*[b["question"] for b in batch])]


def test_more_completions_than_slots() -> None:
    with small(slots=4) as own:
        state = own.run(ask, "many?", n=4)
        error = guarded(lambda: own.error(state))
        assert isinstance(error, RequestError), repr(error)
        assert error.field == "n"


def test_selects_on_few_slots() -> None:
    choices = ["yes", "no", "maybe", "never", "ever"]

    @sgl.function
    def program(s: Any, question: str) -> None:
        s += question
        s += sgl.select("a", choices)
        s += sgl.select("b", choices, choices_method=unconditional_likelihood_normalized)

    batch = [{"question": f"{i}?"} for i in range(6)]
    with rig() as own:
        expected = guarded(lambda: program.run_batch(batch, backend=own.backend, num_threads=1))
        picks = [(state["a"], state["b"]) for state in expected]
    for slots in (8, 3):
        with small(slots=slots) as own:
            states = guarded(lambda own=own: program.run_batch(batch, backend=own.backend))
            assert [state.error() for state in states] == [None] * 6
            assert [(state["a"], state["b"]) for state in states] == picks


def test_streams_on_few_slots() -> None:
    questions = [f"number {i}?" for i in range(20)]
    with small() as own:
        states = [ask.run(q, backend=own.backend, stream=True) for q in questions]
        texts = guarded(lambda: ["".join(state.text_iter()) for state in states])
        assert texts == [f"Question: {q}{x}" for q, x in zip(questions, alone(*questions), strict=True)]


# -- few pages ---------------------------------------------------------------------------------------------


def test_held_histories_make_room_for_a_generation() -> None:
    """A generation that needs their pages half-way says what it does with much room."""
    pools = PoolSizes(tokens=16, slots=8, context=256, burst=256, page=4)  # 18 pages of 16 tokens
    questions = [f"{i}?" for i in range(3)]
    with open_engine(babbling_model(), pools) as engine, rig(engine) as own:
        for question, text in zip(questions, alone(*questions, max_tokens=100), strict=True):
            state = guarded(lambda question=question: own.run(ask, question, max_tokens=100))
            assert state.error() is None
            assert state["x"] == text


def test_held_histories_make_room_for_a_prompt() -> None:
    pools = PoolSizes(tokens=16, slots=8, context=256, burst=256, page=4)
    questions = [f"{i}" * 120 for i in range(4)]
    with open_engine(babbling_model(), pools) as engine, rig(engine) as own:
        states = [guarded(lambda question=question: own.run(ask, question)) for question in questions]
        assert [state.error() for state in states] == [None] * 4
        assert [state["x"] for state in states] == alone(*questions)


# -- what is held ------------------------------------------------------------------------------------------


def test_held_histories_are_bounded() -> None:
    with small(slots=32, held=5) as own:
        for i in range(12):
            guarded(lambda i=i: own.run(ask, f"number {i}?"))
        wait_for(lambda: len(own.engine._link.core.sequences) == 5)
        used = [guarded(lambda i=i: own.run(ask, f"number {i}?")) for i in (11, 0)]
        cached = [state.get_meta_info("x")["cached_tokens"] for state in used]
        # The other's KV is known all the same: that of its prompt was kept when it ended.
        assert cached == [len(own.prompt(f"Question: number {i}?")) for i in (11, 0)]
        assert [state["x"] for state in used] == alone("number 11?", "number 0?")
