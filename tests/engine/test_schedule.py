"""What shares a step: every decode, and prefill chunks up to a budget, the oldest call first."""

from __future__ import annotations

import asyncio

from support.engine import Gate, finish, running, some_tokens, until
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine

ONE = SamplingParams(max_tokens=1, seed=1)


def many(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)


def test_the_budget_is_for_all_prompts_together() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        first = asyncio.ensure_future(engine.generate([5], many(30)))
        await until(lambda: bool(gate.steps))
        others = [asyncio.ensure_future(engine.generate(some_tokens(50, seed), ONE)) for seed in range(4)]
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, *others)

    with running(gate, chunk=64) as engine:
        finish(work(engine))
    # 200 tokens of prompts, each step with the decode of the first call.
    assert gate.steps[:5] == [1, 65, 65, 65, 9]


def test_decodes_go_on_beside_a_long_prompt() -> None:
    gate = Gate()

    async def work(engine: Engine) -> int:
        drawn = 0

        async def decode() -> None:
            nonlocal drawn
            with engine.open([5]) as sequence:
                async for event in sequence.generate(many(60)):
                    drawn += hasattr(event, "tokens")

        decoding = asyncio.ensure_future(decode())
        await until(lambda: drawn > 0)
        before = drawn
        await engine.generate(some_tokens(400), ONE)
        during = drawn - before
        await decoding
        return during

    with running(gate, chunk=16) as engine:
        assert finish(work(engine)) >= 20  # the prompt took 25 steps
    assert max(gate.steps) == 17


def test_older_prompts_come_first() -> None:
    gate = Gate()

    async def work(engine: Engine) -> list[int]:
        order = []

        async def one(number: int) -> None:
            await engine.generate(some_tokens(100, number), ONE)
            order.append(number)

        gate.shut()
        calls = [asyncio.ensure_future(one(number)) for number in range(4)]
        await until(lambda: bool(gate.steps))
        gate.open()
        await asyncio.gather(*calls)
        return order

    with running(gate, chunk=32) as engine:
        assert finish(work(engine)) == [0, 1, 2, 3]


def test_usage_tells_waiting_from_working() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        gate.shut()
        first = asyncio.ensure_future(engine.generate(some_tokens(20), ONE))
        await until(lambda: bool(gate.steps))
        second = asyncio.ensure_future(engine.generate(some_tokens(20), ONE))
        await asyncio.sleep(0.2)
        gate.open()
        first_usage, second_usage = (await first).usage, (await second).usage
        assert first_usage.queued < 0.1 < first_usage.first_token
        assert second_usage.queued > 0.1

    with running(gate) as engine:
        finish(work(engine))
