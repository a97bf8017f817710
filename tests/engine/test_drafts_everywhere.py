"""Depths 0 to 4 give one output: random configs and the embedded model, greedy and sampled, with grammars too."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from support.draw import random_config, random_weights
from support.engine import byte_tokenizer, draft_always, finish, running, some_tokens
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.embedded.data import TASKS
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.embedded.encoding import encode
from weft.runtime.embedded.scoring import held_out
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine
from weft.runtime.engine.handle import Output
from weft.runtime.engine.host import load_model
from weft.runtime.model.model import Model
from weft.runtime.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["red", "green"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(autouse=True)
def never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


async def all_of(engine: Engine, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[Output]:
    """Together, and again from what is known by then."""
    first = await asyncio.gather(*(engine.generate(*one) for one in asked))
    again = await asyncio.gather(*(engine.generate(*one) for one in asked))
    assert [o.tokens for o in again] == [o.tokens for o in first]
    return list(first)


def said(outputs: list[Output]) -> list[object]:
    return [(o.tokens, o.text, o.logprobs, o.finish_reason) for o in outputs]


@pytest.mark.parametrize("seed", range(8))
def test_random_configs(seed: int) -> None:
    config = dataclasses.replace(random_config(seed), vocab_size=byte_tokenizer().size, num_nextn_predict_layers=1)
    ratios = (*config.compress_ratios[: config.num_hidden_layers], 0)
    config = dataclasses.replace(config, compress_ratios=ratios)
    model = Model(config, random_weights(config, seed))
    asked = []
    for i, grammar in enumerate([None, None, JSON, JSON]):
        params = SamplingParams(
            max_tokens=30, seed=i, temperature=[0.0, 1.5][i % 2], logprobs=1, ignore_eos=True, grammar=grammar
        )
        asked.append((some_tokens(90 + 30 * i, seed=i), params))
    outputs = []
    accepted = 0
    for drafts in range(5):
        with running(model, drafts=drafts, slots=3 + drafts, chunk=32 + 16 * drafts, page=4 << drafts) as engine:
            found = finish(all_of(engine, asked))
        outputs.append(said(found))
        accepted += sum(o.usage.accepted for o in found)
    assert all(own == outputs[0] for own in outputs) and accepted > 10


@contextmanager
def embedded(model: Model, drafts: int) -> Iterator[Engine]:
    sizes = PoolSizes(tokens=16_384, slots=20, context=2048, burst=1024)
    config = EngineConfig(pools=sizes, limits=CoreLimits(chunk=512, drafts=drafts))
    with Engine(model, Tokenizer.load(TOKENIZER), config) as engine:
        yield engine


def test_the_embedded_model() -> None:
    """Prompts of every task; it drafts as it was trained to."""
    tokenizer, model = Tokenizer.load(TOKENIZER), load_model(EMBEDDED, EngineConfig())
    asked = []
    for i, task in enumerate(TASKS):
        (example,) = held_out(task, 1)
        made = encode(tokenizer, example)
        prompt = list(made.tokens[: made.learn.index(True)])
        params = SamplingParams(max_tokens=40, seed=i, temperature=[0.0, 1.0][i % 2], logprobs=1)
        asked.append((prompt, params))
        if i < 3:
            asked.append((prompt, SamplingParams(max_tokens=40, seed=i, temperature=1.0, grammar=JSON)))
    outputs, shares = [], []
    for drafts in range(5):
        with embedded(model, drafts) as engine:
            found = asyncio.run(all_of(engine, asked))
        outputs.append(said(found))
        drafted = sum(o.usage.drafted for o in found)
        shares.append(sum(o.usage.accepted for o in found) / max(drafted, 1))
    assert all(own == outputs[0] for own in outputs)
    assert shares[1] > 0.6, shares
