"""Who gets memory, who waits for it and who gives way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.engine import FOUR, Gate, core_of, drawn_again, finish, running, some_tokens, verified
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError


@pytest.mark.parametrize("shared", [0, 200])
def test_no_more_begin_than_will_fit(shared: int) -> None:
    """Memory for three of eight that share nothing, and for all that share most of it: nobody gives way."""
    long = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    gate, most = Gate(), 0

    async def work(engine: Engine) -> None:
        prompts = [[*some_tokens(shared), *some_tokens(240 - shared, 1 + seed)] for seed in range(8)]
        calls = [asyncio.ensure_future(verified(engine, prompt, long)) for prompt in prompts]
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.001)
            nonlocal most
            held = list(core_of(engine).sequences.values())
            most = max(most, sum(bool(sequence.state and sequence.calls) for sequence in held))
        assert sum(call.result().computed for call in calls) == 8 * 299 - 7 * shared
        assert core_of(engine).scheduler.preempted == 0

    with running(gate, tokens=1000, slots=8, context=400, page=1) as engine:
        finish(work(engine))
    assert most == (8 if shared else 3)


def test_one_that_gave_way_goes_on_from_its_state() -> None:
    """Memory for one sequence of two; the younger loses its slot, not what it has computed."""

    async def work(engine: Engine) -> int:
        long = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
        prompts = [some_tokens(100, seed) for seed in range(3)]
        return sum(u.computed for u in await asyncio.gather(*(verified(engine, p, long) for p in prompts)))

    with running(tokens=4096, slots=1) as engine:
        assert finish(work(engine)) == 3 * 139


@pytest.mark.parametrize(("seconds", "kept"), [(60, 0), (0, 1)])
def test_a_pinned_sequence_gives_its_kv_last(seconds: float, kept: int) -> None:
    """Two wait for their tools while a third takes a slot: from the older one, was it not pinned."""

    async def work(engine: Engine) -> list[bool]:
        waiting = [engine.open(some_tokens(80, seed)) for seed in range(2)]
        for sequence in waiting:
            await sequence.complete(FOUR)
        waiting[0].pin(60)
        waiting[0].pin(seconds)
        await verified(engine, some_tokens(80, 5))
        core = core_of(engine)  # which may not have closed the third yet
        held = [core.sequences[sequence.id].state is not None for sequence in waiting]
        for sequence in waiting:
            sequence.close()
        return held

    with running(slots=2) as engine:
        assert finish(work(engine)) == [i == kept for i in range(2)]


def test_a_pin_is_a_lease_that_pressure_reclaims() -> None:
    """There is one slot, and it is pinned; who was pinned goes on, from the state that was kept."""

    async def work(engine: Engine) -> None:
        with engine.open(some_tokens(80, 1)) as waiting:
            await waiting.complete(FOUR)
            waiting.pin(60)
            await verified(engine, some_tokens(80, 5))
            waiting.extend([7])
            usage = (await waiting.complete(FOUR)).usage
        assert (usage.cached, usage.computed) == (83, 2 + 3)

    with running(slots=1) as engine:
        finish(work(engine))


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "60"])
def test_a_pin_is_for_some_seconds(seconds: Any) -> None:
    with running() as engine, engine.open([]) as sequence, pytest.raises(RequestError, match="seconds"):
        sequence.pin(seconds)


@pytest.mark.parametrize("checkpoints", [0, 3])
def test_500_greedy_steps_in_little_memory(checkpoints: int) -> None:
    """Turns of two agents in turn, each evicting what the other has, equal one cold greedy run of each."""
    greedy = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True)

    async def agent(engine: Engine, seed: int) -> None:
        history, drawn = some_tokens(40, seed), 0
        while drawn < 500:
            output = await engine.generate(history, greedy)
            assert output.tokens == drawn_again(history, output.tokens, greedy)
            history += output.tokens
            drawn += len(output.tokens)

    async def work(engine: Engine) -> None:
        await asyncio.gather(agent(engine, 1), agent(engine, 2))

    with running(tokens=576, slots=2, context=576, page=4, checkpoints=checkpoints) as engine:
        finish(work(engine))
        assert core_of(engine).memory.prefix.tree.tokens < 1000  # or nothing was ever evicted
