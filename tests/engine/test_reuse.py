"""What was computed once is not computed again, whoever asks for it, and gives the same bits as if it were."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.engine import FOUR, Gate, byte_tokenizer, core_of, finish, running, some_tokens, verified
from weft.runtime.cache.base import replay_start
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError, WeftError
from weft.runtime.text.tokens import ASSISTANT, THINK_END, THINK_START, USER
from weft.runtime.text.turns import turn_cuts

ROOMY = {"tokens": 16384, "context": 8192}


def test_a_history_that_is_known_is_not_computed() -> None:
    prompt = some_tokens(300)
    gate = Gate()
    with running(gate) as engine:
        cold, again = finish(verified(engine, prompt)), finish(verified(engine, prompt))
    assert (cold.cached, cold.matched, cold.computed, cold.reason) == (0, 0, 303, "no_tokens")
    assert (again.cached, again.matched, again.replayed, again.computed) == (300, 300, 0, 3)
    assert again.reason == "" and again.copied > 0
    assert sum(gate.steps) == 306


def test_an_output_is_known_as_far_as_it_was_computed() -> None:
    """The last token was drawn, not computed."""

    async def work(engine: Engine) -> m.Usage:
        with engine.open(prompt) as sequence:
            output = await sequence.complete(FOUR)
        return await verified(engine, [*prompt, *output.tokens, 7, 8])

    prompt = some_tokens(90)
    with running() as engine:
        usage = finish(work(engine))
    assert (usage.history, usage.cached, usage.computed) == (96, 93, 3 + 3)


@pytest.mark.parametrize("cut", [128, 131, 200])
def test_histories_that_part_share_what_is_before(cut: int) -> None:
    """With no state kept where they part, it is replayed behind the chain."""
    first = some_tokens(300)
    second = [*first[:cut], *some_tokens(60, seed=9)]
    with running() as engine:
        finish(verified(engine, first))
        usage = finish(verified(engine, second))
        start = replay_start(engine.model_config, cut)
    assert (usage.matched, usage.cached, usage.replayed) == (cut, start, cut - start)
    assert usage.computed == cut - start + 60 + 3 and usage.reason == "no_checkpoint"


@pytest.mark.parametrize("how", ["opened", "appended", "appended behind a call"])
def test_state_is_kept_where_it_was_said_that_histories_may_part(how: str) -> None:
    first = some_tokens(300)

    async def work(engine: Engine) -> m.Usage:
        if how == "opened":
            await verified(engine, first, cuts=[131, 200])
        else:
            with engine.open(first[:100]) as sequence:
                calls = []
                if how == "appended behind a call":
                    calls.append(asyncio.ensure_future(sequence.complete(SamplingParams(max_tokens=0))))
                    await asyncio.sleep(0)
                sequence.extend(first[100:], cuts=[31, 100])
                await sequence.complete(FOUR)
                await asyncio.gather(*calls)
        return await verified(engine, [*first[:131], *some_tokens(60, seed=9)])

    with running() as engine:
        usage = finish(work(engine))
    assert (usage.cached, usage.replayed, usage.computed) == (131, 0, 60 + 3)


@pytest.mark.parametrize("cuts", [[301], [-1], [1.5], ["3"]])
def test_cuts_outside_a_history_are_refused(cuts: list[Any]) -> None:
    with running() as engine:
        with pytest.raises(RequestError, match="cuts"):
            engine.open(some_tokens(300), cuts=cuts)
        with engine.open([]) as sequence, pytest.raises(RequestError, match="cuts"):
            sequence.extend(some_tokens(300), cuts=cuts)


def test_long_prefills_keep_state_on_their_way() -> None:
    first = some_tokens(1500)
    with running(**ROOMY) as engine:
        finish(verified(engine, first))
        usage = finish(verified(engine, [*first[:1100], *some_tokens(5, seed=9)]))
    assert (usage.matched, usage.cached) == (1100, 1024) and usage.computed == 76 + 5 + 3


def test_a_fork_of_sixteen_computes_a_long_prefix_once() -> None:
    prompt = some_tokens(4096)
    gate = Gate()

    async def work(engine: Engine) -> None:
        with engine.open(prompt) as parent:
            children = await parent.fork(16)
        params = [SamplingParams(max_tokens=2, seed=i, ignore_eos=True) for i in range(16)]
        outputs = await asyncio.gather(*(c.complete(p) for c, p in zip(children, params, strict=True)))
        assert {child.origin.computed for child in children} == {4096}
        assert {(o.usage.cached, o.usage.computed) for o in outputs} == {(4096, 1)}
        for child in children:
            child.close()
        assert (await verified(engine, prompt)).cached == 4096

    with running(gate, **ROOMY) as engine:
        finish(work(engine))
    assert sum(gate.steps) == 4096 + 16 + 3


def test_histories_that_come_together_compute_their_common_part_once() -> None:
    """Nobody said that they would; the first keeps its state where the others leave it."""
    common = some_tokens(200)
    prompts = [[*common, *some_tokens(30, seed=i)] for i in range(1, 6)]
    gate = Gate()

    async def work(engine: Engine) -> list[m.Usage]:
        return list(await asyncio.gather(*(verified(engine, prompt) for prompt in prompts)))

    with running(gate) as engine:
        usages = finish(work(engine))
    assert [usage.cached for usage in usages] == [0, 200, 200, 200, 200]
    assert sum(gate.steps) == 200 + 5 * (30 + 3)


@pytest.mark.parametrize("before", [1, 7, 16])
def test_a_history_that_parts_shortly_before_goes_on_from_there(before: int) -> None:
    """A prompt whose last tokens are others, and an answer of which the end was trimmed: 31 tokens at most are
    computed again, not 400."""
    long = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)

    async def work(engine: Engine) -> None:
        with engine.open(prompt) as sequence:
            answer = (await sequence.complete(long)).tokens
        for known in (prompt, [*prompt, *answer[:-1]]):
            usage = await verified(engine, [*known[:-before], 5, 6, 7])
            assert usage.matched == len(known) - before and usage.matched - usage.cached < 32 - before
            assert usage.computed == usage.history - usage.cached + 3

    prompt = some_tokens(400)
    with running() as engine:
        finish(work(engine))


def test_near_misses_take_a_quarter_of_the_places_at_most() -> None:
    """And what others keep for them stays when there is no other place."""

    async def work(engine: Engine) -> None:
        for seed in range(6):
            await verified(engine, some_tokens(400, seed))
            memory = core_of(engine).memory
            kinds = [kept.near for kept in memory.prefix.checkpoints.held]
            assert sum(kinds) <= 2 and len(kinds) <= 8
        assert sum(kinds) == 2 and len(kinds) == 8

    with running(checkpoints=8) as engine:
        finish(work(engine))


def test_a_history_that_was_let_go_is_not_one_that_never_was() -> None:
    first, second = some_tokens(300, 1), some_tokens(300, 2)

    async def work(engine: Engine) -> list[str]:
        reasons = []
        for prompt in (first, second, first, [*first[:150], 9, 9]):
            with engine.open(prompt) as sequence:
                reasons.append((await sequence.complete(FOUR)).usage.reason)
        engine.flush()
        reasons.append((await engine.explain(first)).reason)
        reasons.append((await engine.explain(first, namespace="b")).reason)
        return reasons

    with running(tokens=320, slots=1, context=320, page=4) as engine:
        reasons = finish(work(engine))
    assert reasons == ["no_tokens", "no_tokens", "chain_evicted", "no_checkpoint", "chain_evicted", "no_tokens"]


def test_namespaces_share_and_reveal_nothing() -> None:
    prompt = some_tokens(300)
    other = [*prompt[:150], *some_tokens(50, seed=4)]

    async def work(engine: Engine) -> None:
        await verified(engine, prompt, namespace="a")
        for namespace in ("", "b"):
            told = await engine.explain(other, namespace=namespace)
            assert told == m.Explained(
                way="cold",
                matched=0,
                cached=0,
                replayed=0,
                computed=200,
                copied=0,
                reason="no_tokens",
            )
            usage = await verified(engine, prompt, namespace=namespace)
            assert (usage.matched, usage.cached, usage.replayed, usage.computed) == (0, 0, 0, 303)
        assert (await engine.explain(other, namespace="a")).matched == 150
        with engine.open(prompt, namespace="a") as parent:
            (child,) = await parent.fork()
        with child:
            child.extend([5, 6, 7])
            await child.complete(FOUR)
        assert (await engine.explain([*prompt, 5, 6, 7], namespace="a")).cached == 303
        assert (await engine.explain([*prompt, 5, 6, 7], namespace="b")).matched == 300

    with running() as engine:
        finish(work(engine))


def test_what_is_refused_reveals_nothing_of_other_namespaces() -> None:
    """The same wrong requests get the same answers, with and without a neighbour that has the same tokens."""
    prompt = some_tokens(150)

    async def refused(engine: Engine) -> list[str]:
        answers = []
        with engine.open(prompt, namespace="b") as sequence:
            for ask in (
                sequence.complete(SamplingParams(max_tokens=4000)),
                sequence.complete(SamplingParams(stop_token_ids=(1 << 30,))),
                sequence.append_scored(some_tokens(4000)),
                sequence.truncate(1 << 20),
                engine.explain([-1], namespace="b"),
            ):
                with pytest.raises(WeftError) as caught:
                    await ask
                answers.append(f"{type(caught.value).__name__} {caught.value}")
            with pytest.raises(WeftError) as caught:
                await sequence.complete(SamplingParams(max_tokens=40), deadline=1e-9)
            answers.append(str(caught.value))
        return answers

    async def beside(engine: Engine) -> list[str]:
        with engine.open(prompt, namespace="a") as neighbour:
            await neighbour.complete(FOUR)
            return await refused(engine)

    with running() as engine:
        alone = finish(refused(engine))
    with running() as engine:
        assert finish(beside(engine)) == alone
    assert len(set(alone)) == 5


def test_explain_says_what_would_happen_and_changes_nothing() -> None:
    prompt = some_tokens(300)

    async def work(engine: Engine) -> None:
        assert (await engine.explain(prompt)).way == "cold"
        await verified(engine, prompt)
        whole = await engine.explain(prompt)
        assert (whole.way, whole.cached, whole.computed, whole.reason, whole.differs) == (
            "checkpoint",
            300,
            0,
            "",
            None,
        )
        assert whole.copied == core_of(engine).pools.raw_bytes
        wrong = (prompt[250] + 1) % 200 + 3
        other = [*prompt[:250], wrong, 9, 9]
        told = await engine.explain(other)
        assert (told.way, told.matched, told.differs, told.others) == ("replay", 250, wrong, [prompt[250]])
        assert (told.cached, told.replayed, told.reason) == (250 - told.replayed, told.replayed, "no_checkpoint")
        assert await engine.explain(other) == told
        usage = await verified(engine, other)
        assert (usage.matched, usage.cached, usage.replayed) == (told.matched, told.cached, told.replayed)
        assert usage.computed == told.computed + 3
        # Now two ways lead on from there.
        assert sorted((await engine.explain([*prompt[:250], 264])).others) == sorted((wrong, prompt[250]))
        with pytest.raises(RequestError, match="tokens"):
            await engine.explain([1 << 40])

    with running() as engine:
        finish(work(engine))


def test_flush_forgets_what_is_not_open() -> None:
    prompt = some_tokens(100)

    async def work(engine: Engine) -> None:
        with engine.open(prompt) as sequence:
            await sequence.complete(FOUR)
            engine.flush()
            assert (await engine.explain(prompt)).matched == 0
            assert (await sequence.complete(FOUR)).usage.cached == 103
        assert (await verified(engine, prompt)).matched == 100  # the chain of the open one was kept when it ended

    with running() as engine:
        finish(work(engine))


def test_the_borders_of_turns_are_where_histories_part() -> None:
    tokenizer = byte_tokenizer()
    turns = ("Be kind.", USER, "Hello", ASSISTANT, THINK_END, "Hi", USER, "And?", ASSISTANT, THINK_START)
    tokens = [id for part in turns for id in tokenizer.encode(part)]
    texts = [tokenizer.decode(tokens[:cut]) for cut in turn_cuts(tokenizer, tokens)]
    assert texts == ["".join(turns[:n]) for n in (1, 4, 6, 9)]
    assert turn_cuts(tokenizer, tokenizer.encode(USER)) == []
