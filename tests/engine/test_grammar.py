"""Outputs held to a grammar: what is drawn is what sampling draws where only the grammar's tokens are allowed."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from functools import cache
from typing import Any

import llguidance
import numpy as np
import pytest

from support.engine import (
    EOS,
    SECONDS,
    UNPAGED,
    VOCABULARY,
    Gate,
    byte_tokenizer,
    core_of,
    draft_always,
    finish,
    running,
    small_model,
    some_tokens,
)
from support.run import run
from weft.runtime.decoding import grammar as module
from weft.runtime.decoding.grammar import Grammars
from weft.runtime.decoding.params import MAX_GRAMMAR, Grammar, SamplingParams
from weft.runtime.decoding.sampler import Draw, sample
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.errors import RequestError
from weft.runtime.text.tokens import THINK_END, THINK_START

PROMPT = some_tokens(150, seed=1)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "seats": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
            "kind": {"enum": ["red", "green", None]},
        },
        "required": ["city", "seats", "kind"],
        "additionalProperties": False,
    }
)
GRAMMARS = {
    "regex": Grammar("regex", "(yes|no|maybe)( [a-z]{2,6}){1,4}"),
    "json": Grammar("json_schema", SCHEMA),
    "lark": Grammar("lark", 'start: item (", " item)*\nitem: /[a-f]+/ "=" /[0-9]{1,3}/'),
    "choices": Grammar("choices", json.dumps(["left", "right", "straight \u2192 on"])),
}


@cache
def tokenizer() -> Any:
    own = byte_tokenizer()
    return llguidance.LLTokenizer(own.to_json(), n_vocab=own.size, eos_token=EOS)


def matcher(grammar: Grammar) -> Any:
    make = llguidance.LLMatcher
    if grammar.kind == "regex":
        source = make.grammar_from_regex(grammar.text)
    elif grammar.kind == "json_schema":
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        source = make.grammar_from_json_schema(grammar.text, overrides=compact)  # type: ignore[arg-type]
    else:
        text = grammar.text
        if grammar.kind == "choices":
            text = "start: " + " | ".join(map(json.dumps, json.loads(text)))
        source = make.grammar_from_lark(text)
    made = make(tokenizer(), source)
    assert not made.is_error(), made.get_error()
    return made


def drawn_with_masks(prompt: list[int], output: list[int], params: SamplingParams) -> list[int]:
    """From one cold run, token by token, with masks of a matcher of its own."""
    assert params.grammar is not None
    logits = run(small_model(), [*prompt, *output[:-1]], page=UNPAGED)[len(prompt) - 1 :]
    own, counts, picked = matcher(params.grammar), {}, []
    size = byte_tokenizer().size
    for i, token in enumerate(output):
        bits = np.unpackbits(np.frombuffer(own.compute_bitmask(), np.uint8), bitorder="little")[:size]
        allowed = np.zeros(VOCABULARY, np.bool_)
        allowed[:size] = bits
        history = [*prompt, *output[:i]]
        draw = Draw(params, params.seed or 0, len(history), (), dict(counts), history, allowed)
        picked += sample(logits[i : i + 1], [draw])
        counts[token] = counts.get(token, 0) + 1
        assert token == EOS or own.consume_token(token)
    return picked


def matches(grammar: Grammar, text: str) -> bool:
    if grammar.kind == "json_schema":
        found = json.loads(text)
        return list(found) == ["city", "seats", "kind"] and len(found["city"]) <= 8 and len(found["seats"]) <= 3
    patterns = {"lark": r"[a-f]+=[0-9]{1,3}(, [a-f]+=[0-9]{1,3})*", "choices": "left|right|straight → on"}
    return re.fullmatch(patterns.get(grammar.kind, grammar.text), text) is not None


@pytest.fixture(autouse=True)
def never_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("name", GRAMMARS)
def test_every_token_is_what_a_mask_leaves(name: str, temperature: float, drafts: int) -> None:
    params = SamplingParams(
        max_tokens=120, temperature=temperature, seed=7, grammar=GRAMMARS[name], presence_penalty=0.5
    )
    with running(drafts=drafts) as engine:
        output = finish(engine.generate(PROMPT, params))
    assert output.tokens == drawn_with_masks(PROMPT, output.tokens, params)
    if output.finish_reason == "stop":
        assert matches(GRAMMARS[name], output.text)


@pytest.mark.parametrize("drafts", [0, 2])
def test_together_from_what_is_known_and_in_little_memory(drafts: int) -> None:
    async def work(engine: Engine) -> None:
        asked = []
        for i, grammar in enumerate([*GRAMMARS.values(), *GRAMMARS.values()]):
            prompt = PROMPT[: 40 + 20 * (i % 3)] + some_tokens(i, seed=i)
            asked.append((prompt, SamplingParams(max_tokens=40, seed=i, temperature=1.3, grammar=grammar)))
        for _ in range(2):
            outputs = await asyncio.gather(*(engine.generate(*one) for one in asked))
            for (prompt, params), output in zip(asked, outputs, strict=True):
                assert output.tokens == drawn_with_masks(prompt, output.tokens, params)

    with running(drafts=drafts, tokens=600, slots=3, context=300, page=5) as engine:
        finish(work(engine))


def test_what_is_certain_takes_no_steps_of_its_own() -> None:
    """Random weights choose among many spellings of a string; its frame is the schema's alone."""
    schema = json.dumps(
        {
            "type": "object",
            "properties": {
                "a long and certain name": {"type": "boolean"},
                "another": {"const": "always it"},
            },
            "required": ["a long and certain name", "another"],
            "additionalProperties": False,
        }
    )
    gate = Gate()
    params = SamplingParams(max_tokens=100, temperature=0, grammar=Grammar("json_schema", schema))
    with running(gate, drafts=1) as engine:
        output = finish(engine.generate(PROMPT, params))
    assert set(json.loads(output.text)) == {"a long and certain name", "another"}
    assert len(output.tokens) > 50 and len(gate.steps) < 3 + len(output.tokens) / 4
    assert output.tokens == drawn_with_masks(PROMPT, output.tokens, params)


def test_thinking_comes_first() -> None:
    """The reasoning is free, but has to end; then the grammar holds."""
    start, end = (byte_tokenizer().encode(mark)[0] for mark in (THINK_START, THINK_END))
    bias = {end: 6.0}  # or random weights would think for ever
    grammar = Grammar("regex", "(yes|no)", thinking=True)
    params = SamplingParams(max_tokens=300, temperature=1.0, seed=2, grammar=grammar, logit_bias=bias)

    async def work(engine: Engine) -> Output:
        return await engine.generate([*PROMPT, start], params)

    texts = []
    for drafts in (0, 3):
        with running(drafts=drafts) as engine:
            output = finish(work(engine))
        assert output.finish_reason == "stop" and output.tokens.count(end) == 1
        texts.append(output.text)
        assert output.text.split(THINK_END)[1] in ("yes", "no") and EOS not in output.tokens
    assert texts[0] == texts[1]


def test_it_comes_before_other_settings() -> None:
    """Bans and a least length that leave nothing of the grammar are left out."""
    banned = {token: -100.0 for token in byte_tokenizer().encode("yn")}
    params = SamplingParams(
        max_tokens=9, min_tokens=9, logit_bias=banned, grammar=Grammar("regex", "(yes|no)"), ignore_eos=True
    )
    with running() as engine:
        output = finish(engine.generate(PROMPT, params))
    assert output.text in ("yes", "no") and output.finish_reason == "stop" and output.stop is None


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "(yes"), "unclosed group"),
        (Grammar("regex", "a(?=b)"), "look-around"),
        (Grammar("json_schema", "{"), "EOF|expected"),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Grammar("lark", "start: missing"), "missing"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(grammar: Grammar, reason: str) -> None:
    async def work(engine: Engine) -> Output:
        with pytest.raises(RequestError, match=reason) as caught:
            await engine.generate(PROMPT, SamplingParams(grammar=grammar))
        assert caught.value.field == grammar.kind and caught.value.value == grammar.text
        return await engine.generate(PROMPT, SamplingParams(max_tokens=3))  # nothing else has suffered

    with running() as engine:
        assert len(finish(work(engine)).tokens) > 0


def test_a_refusal_may_come_at_any_time() -> None:
    """While the prompt is computed, a step is prepared, or calls wait."""
    bad = Grammar("lark", "start: missing")

    async def work(engine: Engine) -> None:
        for length in range(60):
            with pytest.raises(RequestError, match="missing"):
                await engine.generate(PROMPT[: 1 + length], SamplingParams(grammar=bad))
            core_of(engine).grammars._compiled.clear()
        assert (await engine.generate(PROMPT, SamplingParams(max_tokens=3))).tokens

    with running(chunk=4) as engine:
        finish(work(engine))


@pytest.mark.parametrize(("field", "limit"), [("step_max_items", 5), ("step_lexer_fuel", 20)])
def test_a_grammar_that_becomes_too_much_fails_its_call(
    field: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance would let the output end anywhere."""
    monkeypatch.setattr(module, "_LIMITS", llguidance.LLParserLimits(**{field: limit}))
    schema = json.dumps(
        {"type": "object", "additionalProperties": {"type": "string", "pattern": "^(a|b)*c{1,40}$"}}
    )

    async def work(engine: Engine) -> None:
        params = SamplingParams(grammar=Grammar("json_schema", schema), max_tokens=100)
        good = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)))
        with pytest.raises(RequestError, match=r"(too|Too) (many|big)") as caught:
            await engine.generate(PROMPT, params)
        assert caught.value.field == "json_schema"
        assert len((await good).tokens) == 30

    for drafts in (0, 3):
        with running(drafts=drafts) as engine:
            finish(work(engine))


def test_compiling_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(module, "_SECONDS", 0.05)
    monkeypatch.setattr(Grammars, "_source", lambda self, own: release.wait(SECONDS) and "")

    async def work(engine: Engine) -> None:
        with pytest.raises(RequestError, match="not compiled within"):
            await engine.generate(PROMPT, SamplingParams(grammar=GRAMMARS["regex"]))
        assert (await engine.generate(PROMPT, SamplingParams(max_tokens=3))).tokens

    with running() as engine:
        finish(work(engine))
        release.set()


def test_a_grammar_has_a_size_limit() -> None:
    with pytest.raises(RequestError, match="longer than"):
        SamplingParams(grammar=Grammar("regex", "a" * (MAX_GRAMMAR + 1))).validate()
