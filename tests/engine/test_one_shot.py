"""`Engine.generate` with prompt log-probabilities, and `Engine.sample`."""

import asyncio

import pytest
import torch

from support.engine import byte_tokenizer, running, small_model, some_tokens
from support.run import run
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError

PARAMS = SamplingParams(max_tokens=8, seed=5, ignore_eos=True)


def test_prompt_logprobs_come_with_the_output() -> None:
    prompt = some_tokens(150)
    with running() as engine:
        plain = asyncio.run(engine.generate(prompt, PARAMS))
        output = asyncio.run(engine.generate(prompt, PARAMS, prompt_logprobs=2))
    assert output.tokens == plain.tokens and plain.prompt_logprobs == []
    table = torch.log_softmax(run(small_model(), prompt), 1)
    assert [p.token for p in output.prompt_logprobs] == prompt[1:]
    for row, scored in zip(table, output.prompt_logprobs, strict=False):
        assert scored.logprob == pytest.approx(float(row[scored.token]), abs=1e-6)
        best = row[: byte_tokenizer().size].topk(2)
        assert [token for token, _ in scored.top] == best.indices.tolist()


def test_samples_are_those_of_their_seeds_and_share_the_prompt() -> None:
    prompt = some_tokens(100)
    with running() as engine:
        outputs = asyncio.run(engine.sample(prompt, PARAMS, 4))
        for i, output in enumerate(outputs):
            params = SamplingParams(max_tokens=8, seed=5 + i, ignore_eos=True)
            assert asyncio.run(engine.generate(prompt, params)).tokens == output.tokens
        assert all(output.usage.cached == len(prompt) for output in outputs)
        assert len({tuple(output.tokens) for output in outputs}) > 1
        with pytest.raises(RequestError, match="count = 0"):
            asyncio.run(engine.sample(prompt, PARAMS, 0))
