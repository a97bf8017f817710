"""Calls on a sequence run in the order they are made, each on the history it was made for."""

from __future__ import annotations

import asyncio

import pytest

from support.engine import VOCABULARY, Gate, drawn_again, finish, running, some_tokens, until
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import Cancelled, ContextLengthError, EngineDead, RequestError

PROMPT = some_tokens(40, seed=4)
PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


# -- order ---------------------------------------------------------------------------------------------


def test_calls_made_at_once_run_one_after_another() -> None:
    async def work(engine: Engine) -> None:
        sequence = engine.open(PROMPT)
        first, scores, second, (child,), third = await asyncio.gather(
            sequence.complete(PARAMS),
            sequence.append_scored([7, 8]),
            sequence.complete(PARAMS),
            sequence.fork(),
            sequence.complete(PARAMS),
        )
        history = PROMPT + first.tokens
        assert first.tokens == drawn_again(PROMPT, first.tokens, PARAMS)
        assert [entry.token for entry in scores] == [7, 8]
        history += [7, 8]
        assert second.tokens == drawn_again(history, second.tokens, PARAMS)
        history += second.tokens
        # The child has the history of its place in the row, not what came after.
        outputs = [third, await child.complete(PARAMS)]
        assert [o.tokens for o in outputs] == [drawn_again(history, third.tokens, PARAMS)] * 2
        sequence.close()
        child.close()

    with running(chunk=16) as engine:
        finish(work(engine))


def test_tokens_appended_while_a_call_runs_come_after_its_output() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            async for event in sequence.generate(PARAMS):
                if isinstance(event, m.Delta):
                    sequence.extend([9] * len(event.tokens))
            usage = (await sequence.complete(PARAMS)).usage
            assert usage.history == len(PROMPT) + 6 + 6

    with running() as engine:
        finish(work(engine))


def test_appended_tokens_wait_for_the_last_call_made_before_them() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            gate.shut()
            first = asyncio.ensure_future(sequence.complete(PARAMS))
            second = asyncio.ensure_future(sequence.complete(PARAMS))
            await asyncio.sleep(0)
            sequence.extend([9, 10])
            third = asyncio.ensure_future(sequence.complete(PARAMS))
            await asyncio.sleep(0)
            gate.open()
            histories = [(await call).usage.history for call in (first, second, third)]
            assert histories == [40, 46, 54]

    with running(gate) as engine:
        finish(work(engine))


def test_appended_tokens_outlive_the_call_they_waited_for() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            gate.shut()
            call = asyncio.ensure_future(sequence.complete(PARAMS))
            await until(lambda: bool(gate.steps))
            sequence.extend([9, 10])
            call.cancel()
            await asyncio.sleep(0)
            gate.open()
            usage = (await sequence.complete(PARAMS)).usage
            assert usage.history >= len(PROMPT) + 2

    with running(gate) as engine:
        finish(work(engine))


def test_appended_tokens_wait_for_calls_that_a_cancelled_one_was_behind() -> None:
    """The first call still draws when the second, which they were appended behind, is cancelled."""
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            first = asyncio.ensure_future(sequence.complete(PARAMS))
            await until(lambda: len(gate.steps) >= 2)
            gate.shut()
            second = asyncio.ensure_future(sequence.complete(PARAMS))
            await asyncio.sleep(0)
            sequence.extend([9, 10])
            third = asyncio.ensure_future(sequence.complete(PARAMS))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.sleep(0)
            gate.open()
            output = (await first).tokens
            assert output == drawn_again(PROMPT, output, PARAMS)
            history = [*PROMPT, *output, 9, 10]
            output = (await third).tokens
            assert output == drawn_again(history, output, PARAMS)

    with running(gate) as engine:
        finish(work(engine))


# -- truncation ----------------------------------------------------------------------------------------


def test_tokens_not_computed_can_be_dropped() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            await sequence.truncate(30)
            first = await sequence.complete(PARAMS)
            assert first.tokens == drawn_again(PROMPT[:30], first.tokens, PARAMS)
            await sequence.truncate(35)  # the last token drawn was not computed
            sequence.extend([9])
            second = await sequence.complete(PARAMS)
            history = PROMPT[:30] + first.tokens[:-1] + [9]
            assert second.tokens == drawn_again(history, second.tokens, PARAMS)

    with running() as engine:
        finish(work(engine))


@pytest.mark.parametrize("length", [-1, 0, 34, 37])
def test_computed_tokens_stay_and_none_can_be_made_up(length: int) -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT[:30]) as sequence:
            await sequence.complete(PARAMS)
            with pytest.raises(RequestError) as caught:
                await sequence.truncate(length)
            assert (caught.value.field, caught.value.value) == ("length", length)
            assert (await sequence.complete(PARAMS)).usage.history == 36

    with running() as engine:
        finish(work(engine))


def test_a_busy_sequence_is_not_truncated() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            gate.shut()
            call = asyncio.ensure_future(sequence.complete(PARAMS))
            await until(lambda: bool(gate.steps))
            truncating = asyncio.ensure_future(sequence.truncate(len(PROMPT)))
            await asyncio.sleep(0)
            gate.open()
            with pytest.raises(RequestError, match="busy"):
                await truncating
            assert len((await call).tokens) == 6

    with running(gate) as engine:
        finish(work(engine))


# -- closing -------------------------------------------------------------------------------------------


def test_closing_ends_the_calls_of_the_sequence_only() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        sequence, other = engine.open(PROMPT), engine.open(PROMPT)
        gate.shut()
        calls = [asyncio.ensure_future(sequence.complete(PARAMS)), asyncio.ensure_future(sequence.fork(2))]
        survivor = asyncio.ensure_future(other.complete(PARAMS))
        await until(lambda: bool(gate.steps))
        sequence.close()
        sequence.close()
        gate.open()
        for call in calls:
            with pytest.raises(Cancelled, match="closed"):
                await call
        assert len((await survivor).tokens) == 6
        other.close()

    with running(gate) as engine:
        finish(work(engine))


def test_a_closed_sequence_takes_no_calls() -> None:
    async def work(engine: Engine) -> None:
        sequence = engine.open(PROMPT)
        sequence.close()
        for call in (
            sequence.complete(PARAMS),
            sequence.fork(),
            sequence.append_scored([5]),
            sequence.truncate(1),
        ):
            with pytest.raises(Cancelled, match="the sequence is closed"):
                await call
        with pytest.raises(Cancelled, match="the sequence is closed"):
            sequence.extend([5])

    with running() as engine:
        finish(work(engine))


def test_a_closed_engine_takes_no_calls() -> None:
    async def work(engine: Engine) -> None:
        sequence = engine.open(PROMPT)
        engine.close()
        with pytest.raises(EngineDead, match="closed"):
            await sequence.complete(PARAMS)
        with pytest.raises(EngineDead, match="closed"):
            engine.open(PROMPT)
        sequence.close()

    with running(leaks=True) as engine:
        finish(work(engine))


# -- what does not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**30, 1.5, True, "a", None])
def test_tokens_outside_the_vocabulary_are_refused(token: object) -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as sequence:
            for use in (engine.open, sequence.extend):
                with pytest.raises(RequestError) as caught:
                    use([5, token])  # type: ignore[list-item]
                assert (caught.value.field, caught.value.value) == ("tokens", token)
            with pytest.raises(RequestError, match="tokens"):
                await sequence.append_scored([token])  # type: ignore[list-item]
            assert (await sequence.complete(PARAMS)).usage.history == len(PROMPT)

    with running() as engine:
        finish(work(engine))


def test_what_exceeds_the_context_is_refused_before_any_work() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(some_tokens(95)) as sequence:
            with pytest.raises(ContextLengthError, match="context holds 100"):
                await sequence.complete(PARAMS)  # 95 + 6
            with pytest.raises(ContextLengthError):
                await sequence.append_scored([5] * 6)
            with pytest.raises(ContextLengthError):
                await sequence.score([[5], [5] * 6])
        with pytest.raises(ContextLengthError):
            await engine.generate(some_tokens(101), SamplingParams(max_tokens=0))
        assert gate.steps in ([], [64, 31, 1], [64, 31])  # at most what scoring shares, and [5]

    with running(gate, context=100) as engine:
        finish(work(engine))


def test_a_refused_score_leaves_the_history_as_it_was() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(some_tokens(90)) as sequence:
            with pytest.raises(ContextLengthError):
                await sequence.append_scored([5] * 11)
            assert (await sequence.complete(PARAMS)).usage.history == 90

    with running(context=100) as engine:
        finish(work(engine))


def test_the_context_can_be_used_to_its_last_token() -> None:
    params = SamplingParams(max_tokens=10, seed=1, ignore_eos=True)

    async def work(engine: Engine) -> None:
        with engine.open(some_tokens(90)) as sequence:
            output = await sequence.complete(params)
            assert output.tokens == drawn_again(some_tokens(90), output.tokens, params)
            (child,) = await sequence.fork()  # computes token 100
            child.close()
            with pytest.raises(ContextLengthError):
                await sequence.complete(SamplingParams(max_tokens=1))

    with running(context=100, page=7) as engine:
        finish(work(engine))
