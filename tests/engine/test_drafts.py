"""Drafts change how many steps an output takes, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from support.engine import Gate, core_of, draft_always, drawn_again, finish, running, some_tokens
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.errors import ConfigError

PROMPT = some_tokens(150, seed=1)
# Noise that two distributions share makes them agree often, also with random weights.
WARM = SamplingParams(max_tokens=60, seed=11, temperature=1.5, logprobs=2, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=60, temperature=0, logprobs=2, ignore_eos=True)
ODD = SamplingParams(
    max_tokens=50,
    min_tokens=20,
    seed=5,
    temperature=1.4,
    top_p=0.95,
    presence_penalty=0.7,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    stop_token_ids=tuple(range(3, 40)),
    stop=("a", "e"),
    logprobs=1,
)


@pytest.fixture(autouse=True)
def never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights draft badly; go on all the same, and as far as may be."""
    draft_always(monkeypatch)


def fields(output: Output) -> tuple[object, ...]:
    return output.tokens, output.text, output.logprobs, output.finish_reason, output.stop, output.kept


@pytest.mark.parametrize("drafts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("params", [WARM, GREEDY, ODD], ids=["warm", "greedy", "odd"])
def test_one_output_at_every_depth(params: SamplingParams, drafts: int) -> None:
    with running() as engine:
        want = finish(engine.generate(PROMPT, params))
    gate = Gate()
    with running(gate, drafts=drafts) as engine:
        got = finish(engine.generate(PROMPT, params))
    assert fields(got) == fields(want)
    assert want.usage.drafted == 0 < got.usage.drafted
    assert got.usage.computed == want.usage.computed
    if params is WARM:
        assert got.usage.accepted >= 10
        assert len(gate.steps) == 3 + 59 - got.usage.accepted  # 3 of the prompt


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("drafts", [1, 4])
def test_together_from_what_is_known_and_in_little_memory(drafts: int, page: int) -> None:
    """Prompts that share, run together and again, with slots for few of them: hits, replays, preemption."""

    async def work(engine: Engine) -> int:
        accepted = 0
        for turn in range(2):
            prompts = [PROMPT[: 40 + 20 * (i % 4)] + some_tokens(3 * i, seed=i) for i in range(6)]
            some = [SamplingParams(max_tokens=30, seed=i, temperature=1.5, ignore_eos=True) for i in range(6)]
            outputs = await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, some, strict=True)))
            for prompt, params, output in zip(prompts, some, outputs, strict=True):
                assert output.tokens == drawn_again(prompt, output.tokens, params)
                accepted += output.usage.accepted
                assert turn == 0 or output.usage.cached > 0
        return accepted

    with running(drafts=drafts, tokens=700, slots=3, context=400, page=page) as engine:
        assert finish(work(engine)) > 20


def test_forks_of_a_history_that_was_drafted_go_their_own_ways() -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as parent:
            first = await parent.complete(WARM)
            children = await parent.fork(3)
            history = [*PROMPT, *first.tokens]
            for i, child in enumerate(children):
                child.extend([5 + i])
            params = SamplingParams(max_tokens=25, seed=3, temperature=1.5, ignore_eos=True)
            outputs = await asyncio.gather(*(child.complete(params) for child in children))
            for i, (child, output) in enumerate(zip(children, outputs, strict=True)):
                assert output.tokens == drawn_again([*history, 5 + i], output.tokens, params)
                child.close()

    with running(drafts=3) as engine:
        finish(work(engine))


def test_hopeless_drafts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with running(drafts=4) as engine:
        usage = finish(
            engine.generate(PROMPT, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        ).usage
    assert usage.accepted < 3 and 1 <= usage.drafted < 40


def test_a_model_without_the_block_drafts_nothing_and_depth_has_bounds() -> None:
    with running(drafts=2) as engine:
        assert core_of(engine).model.config.has_mtp
    with pytest.raises(ConfigError, match=r"limits\.drafts"):
        running(drafts=8).__enter__()
