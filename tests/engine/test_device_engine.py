"""The engine over the model on device tensors: hits, forks, preemption and drafts give what a cold run gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch

from support.device import DEVICE, logits_of, on_device, references
from support.engine import byte_tokenizer, core_of, draft_always, finish, running, small_config, some_tokens
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.embedded.data import TASKS
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.embedded.encoding import encode
from weft.runtime.embedded.scoring import held_out
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine
from weft.runtime.engine.host import load_model
from weft.runtime.model.cuda.model import DeviceModel
from weft.runtime.text.tokenizer import Tokenizer

FORMATS = ("fp8", "fp4")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
# Logits of two runs may differ so much where a value was rounded the other way (`support.device`).
NEAR = 0.02 if DEVICE == "cpu" else 0.2


@pytest.fixture(autouse=True, scope="module")
def ops() -> Iterator[None]:
    with references():
        yield


@cache
def model() -> DeviceModel:
    config = small_config(4, 128)
    weights = dummy_weights(config, seed=1)
    weights["head.weight"][byte_tokenizer().size :] *= 3
    return on_device(config, weights)


def likeliest(prompt: Sequence[int], output: Sequence[int]) -> None:
    """Every token of the output has the highest logit that a cold run gives it there, or nearly."""
    logits = logits_of(model(), [*prompt, *output[:-1]])[len(prompt) - 1 :, : byte_tokenizer().size]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= NEAR


async def verified(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> m.Usage:
    with engine.open(prompt) as sequence:
        output = await sequence.complete(params)
    likeliest(prompt, output.tokens)
    return output.usage


def test_hits_replays_and_forks() -> None:
    prompt = some_tokens(90)

    async def work(engine: Engine) -> None:
        cold = await verified(engine, prompt)
        assert (cold.cached, cold.computed) == (0, 95)
        again = await verified(engine, [*prompt, 7, 8])
        assert again.cached >= 80
        parted = await verified(engine, [*prompt[:60], *some_tokens(20, 1)])
        assert parted.matched == 60 and parted.replayed
        with engine.open(prompt) as parent:
            children = await parent.fork(3)
            for number, child in enumerate(children):
                child.extend([10 + number])
            outputs = await asyncio.gather(*(child.complete(GREEDY) for child in children))
            for number, (child, output) in enumerate(zip(children, outputs, strict=True)):
                likeliest([*prompt, 10 + number], output.tokens)
                child.close()

    with running(model(), formats=FORMATS) as engine:
        finish(work(engine))


def test_calls_together_and_too_little_memory() -> None:
    """Three slots for six calls, and pages for fewer: those that give way come back."""

    async def work(engine: Engine) -> None:
        prompts = [[*some_tokens(40), *some_tokens(30, seed)] for seed in range(1, 7)]
        long = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        await asyncio.gather(*(verified(engine, prompt, long) for prompt in prompts))

    with running(model(), formats=FORMATS, tokens=300, slots=3, context=256, page=4) as engine:
        finish(work(engine))


@pytest.mark.parametrize("drafts", [1, 4])
def test_drafts(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights draft badly: nearly every draft is taken back."""
    draft_always(monkeypatch)

    async def work(engine: Engine) -> int:
        long = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        found = await asyncio.gather(*(verified(engine, some_tokens(100 + 9 * i, i), long) for i in range(3)))
        return sum(usage.drafted for usage in found)

    with running(model(), formats=FORMATS, drafts=drafts) as engine:
        assert finish(work(engine)) > 20


def test_scores_and_grammars() -> None:
    prompt, scored = some_tokens(50), some_tokens(20, 1)

    async def work(engine: Engine) -> None:
        with engine.open(prompt) as sequence:
            (found,) = await sequence.score([scored])
            grammar = Grammar("regex", "(red|green) apple")
            output = await sequence.complete(SamplingParams(max_tokens=20, temperature=0.0, grammar=grammar))
        logits = logits_of(model(), [*prompt, *scored])[49:-1]
        own = logits.log_softmax(1).gather(1, torch.tensor(scored)[:, None])[:, 0]
        assert (torch.tensor([one.logprob for one in found]) - own).abs().max() < NEAR
        assert output.text in ("red apple", "green apple")

    with running(model(), formats=FORMATS) as engine:
        finish(work(engine))


def test_a_new_core_takes_the_model_over() -> None:
    """After a fault, with pools of its own."""

    async def work(engine: Engine) -> None:
        first = core_of(engine).pools
        core_of(engine).scheduler.begin = None  # type: ignore[method-assign, assignment]
        with pytest.raises(Exception, match="core"):
            await verified(engine, some_tokens(20))
        await verified(engine, some_tokens(20))
        assert core_of(engine).pools is not first

    with running(model(), formats=FORMATS, restarts=1) as engine:
        finish(work(engine))


# -- the embedded model ------------------------------------------------------------------------------


def prompts() -> list[list[int]]:
    """The beginning of a dialogue of each task."""
    tokenizer = Tokenizer.load(TOKENIZER)
    made = [encode(tokenizer, held_out(task, 1)[0]) for task in TASKS]
    return [list(one.tokens[: one.learn.index(True)]) for one in made]


async def answers(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    return [output.tokens for output in await asyncio.gather(*(engine.generate(one, params) for one in asked))]


def test_the_embedded_model_answers_as_on_the_host() -> None:
    """The same tokens, greedily, with the same formats; it drafts as it was trained to."""
    tokenizer, checkpoint = Tokenizer.load(TOKENIZER), Checkpoint.open(EMBEDDED)
    config = EngineConfig(
        quant_sim=True,
        kv_format="fp8",
        index_format="fp4",
        pools=PoolSizes(tokens=16_384, slots=20, context=2048, burst=1024),
        limits=CoreLimits(chunk=256, drafts=1),
    )
    host = load_model(EMBEDDED, config)
    device = on_device(checkpoint.config, dict(checkpoint.load(torch.float32, None)))
    asked = prompts()
    found = []
    for network in (host, device):
        with Engine(network, tokenizer, config) as engine:
            found.append(asyncio.run(answers(engine, asked)))
    assert found[0] == found[1]
    assert sum(map(len, found[0])) > 5 * len(asked)
