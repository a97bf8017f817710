"""What a generation returns, against the logits of a cold run without engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from support.engine import EOS, Gate, byte_tokenizer, drawn_again, finish, running, small_model, some_tokens
from support.run import run
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError

PROMPT = some_tokens(140)  # c128a has an entry, c4a more than its indexer picks
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
WARM = SamplingParams(max_tokens=16, seed=5, ignore_eos=True)


def test_greedy_is_the_argmax_of_every_step() -> None:
    size = byte_tokenizer().size
    with running() as engine:
        output = finish(engine.generate(PROMPT, GREEDY)).tokens
    logits = run(small_model(), PROMPT + output)[len(PROMPT) - 1 : -1]
    assert output == logits[:, :size].argmax(1).tolist()
    # Had ids without a meaning not been left out, they would have won at times.
    assert (logits.argmax(1) >= size).any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "temperature": 0.2},
        {"repetition_penalty": 1.8, "temperature": 0.2},
        {"logit_bias": {7: 4.0, 8: -100.0}},
        {"temperature": 0.0, "frequency_penalty": 2.0},
        {"min_tokens": 10, "ignore_eos": False, "stop_token_ids": (40, 50), "logit_bias": {40: 100.0, EOS: 50.0}},
    ],
)
def test_sampling_uses_the_logits_of_a_cold_run(changes: dict[str, Any]) -> None:
    params = SamplingParams(**({"max_tokens": 16, "seed": 5, "ignore_eos": True} | changes))
    with running() as engine:
        output = finish(engine.generate(PROMPT, params)).tokens
    assert output == drawn_again(PROMPT, output, params)


@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 127, 128, 129])
def test_generation_may_begin_anywhere(length: int) -> None:
    with running() as engine:
        output = finish(engine.generate(PROMPT[:length], WARM)).tokens
    assert output == drawn_again(PROMPT[:length], output, WARM)


def test_no_seed_draws_one() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with running() as engine:
        outputs = [finish(engine.generate(PROMPT[:5], params)).tokens for _ in range(3)]
    assert len({tuple(output) for output in outputs}) == 3


def test_text_prompts_are_encoded_as_they_stand() -> None:
    with running() as engine:
        by_text = finish(engine.generate("hé", WARM))
        by_tokens = finish(engine.generate([3 + byte for byte in "hé".encode()], WARM))
    assert by_text.tokens == by_tokens.tokens
    assert by_text.text == byte_tokenizer().decode(by_text.tokens)


# -- ends ----------------------------------------------------------------------------------------------


def test_max_tokens_zero_computes_the_prompt_and_draws_nothing() -> None:
    async def work() -> m.Usage:
        with engine.open(PROMPT) as sequence:
            done = await sequence.complete(SamplingParams(max_tokens=0))
            assert (done.tokens, done.text, done.finish_reason, done.kept) == ([], "", "length", 0)
            assert done.usage.computed == len(PROMPT)
            return (await sequence.complete(SamplingParams(max_tokens=1))).usage

    with running() as engine:
        assert finish(work()).cached == len(PROMPT)


def test_a_stop_token_ends_the_output() -> None:
    with running() as engine:
        free = finish(engine.generate(PROMPT, WARM))
        at = 9
        params = SamplingParams(max_tokens=16, seed=5, ignore_eos=True, stop_token_ids=(free.tokens[at], 260))
        stopped = finish(engine.generate(PROMPT, params))
    first = free.tokens.index(free.tokens[at])
    assert stopped.tokens == free.tokens[: first + 1]
    assert (stopped.finish_reason, stopped.stop, stopped.usage.generated) == ("stop", free.tokens[at], first + 1)
    assert stopped.text == byte_tokenizer().decode(stopped.tokens[:-1])


@pytest.mark.parametrize("ignore", [False, True])
def test_eos_ends_the_output_unless_ignored(ignore: bool) -> None:
    params = SamplingParams(max_tokens=6, seed=1, logit_bias={EOS: 100.0}, ignore_eos=ignore)
    with running() as engine:
        done = finish(engine.generate(PROMPT, params))
    if ignore:
        assert (done.tokens, done.finish_reason, done.stop, done.kept) == ([EOS] * 6, "length", None, 6)
    else:
        assert (done.tokens, done.finish_reason, done.stop, done.kept) == ([EOS], "stop", EOS, 0)
        assert done.text == ""


def test_min_tokens_holds_eos_off() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=4, seed=1, logit_bias={EOS: 100.0})
    with running() as engine:
        done = finish(engine.generate(PROMPT, params))
    assert EOS not in done.tokens[:4]
    assert (done.tokens[4:], done.stop) == ([EOS], EOS)


def test_a_stop_string_cuts_the_text_and_leaves_the_tokens() -> None:
    params = SamplingParams(max_tokens=9, temperature=0, logit_bias={3 + ord("a"): 100.0}, stop=("aaa",))
    with running() as engine:
        done = finish(engine.generate("x", params))
        assert (done.text, done.stop, len(done.tokens), done.kept) == ("", "aaa", 3, 0)


# -- the stream ------------------------------------------------------------------------------------------


def test_deltas_come_token_by_token_and_join_to_the_output() -> None:
    async def work() -> list[m.Delta | m.Done]:
        with engine.open(PROMPT) as sequence:
            return [event async for event in sequence.generate(WARM)]

    with running() as engine:
        *deltas, done = finish(work())
        whole = finish(engine.generate(PROMPT, WARM))
    assert isinstance(done, m.Done)
    assert [d.tokens for d in deltas if isinstance(d, m.Delta) and d.tokens] == [[t] for t in whole.tokens]
    assert "".join(d.text for d in deltas if isinstance(d, m.Delta)) == whole.text
    assert (done.length, done.finish_reason, done.kept) == (len(PROMPT) + 16, "length", 16)


def test_logprobs_are_those_of_the_model() -> None:
    params = SamplingParams(max_tokens=8, seed=3, temperature=0.4, top_k=9, logprobs=3, ignore_eos=True)
    with running() as engine:
        done = finish(engine.generate(PROMPT, params))
        bare = finish(engine.generate(PROMPT, SamplingParams(max_tokens=2, logprobs=0)))
    table = torch.log_softmax(run(small_model(), PROMPT + done.tokens)[len(PROMPT) - 1 : -1], dim=-1)
    assert [entry.token for entry in done.logprobs] == done.tokens
    for entry, row in zip(done.logprobs, table, strict=True):
        assert entry.logprob == row[entry.token].item()
        values, ids = row[: byte_tokenizer().size].topk(3)
        assert entry.top == list(zip(ids.tolist(), values.tolist(), strict=True))
    assert [entry.top for entry in bare.logprobs] == [[], []]


def test_without_logprobs_there_are_none() -> None:
    with running() as engine:
        assert finish(engine.generate(PROMPT, WARM)).logprobs == []


def test_usage_counts_what_was_run() -> None:
    gate = Gate()

    async def work() -> tuple[m.Usage, m.Usage]:
        with engine.open(PROMPT) as sequence:
            first = (await sequence.complete(GREEDY)).usage
            sequence.extend([5, 6, 7])
            return first, (await sequence.complete(GREEDY)).usage

    with running(gate, chunk=50) as engine:
        first, second = finish(work())
    assert (first.history, first.cached, first.computed, first.generated) == (140, 0, 155, 16)
    # The last drawn token was not computed before.
    assert (second.history, second.cached, second.computed, second.generated) == (159, 155, 19, 16)
    assert gate.steps == [50, 50, 40] + [1] * 15 + [4] + [1] * 15
    for usage in (first, second):
        assert 0 <= usage.queued <= usage.first_token <= usage.total < math.inf


def test_an_empty_history_has_no_next_token() -> None:
    async def work() -> list[int]:
        with engine.open([]) as sequence:
            with pytest.raises(RequestError) as caught:
                await sequence.complete(WARM)
            assert caught.value.field == "tokens"
            sequence.extend(PROMPT)
            return (await sequence.complete(WARM)).tokens

    with running() as engine:
        assert finish(work()) == finish(engine.generate(PROMPT, WARM)).tokens
