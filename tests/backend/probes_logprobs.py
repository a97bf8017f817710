"""return_logprob and its companions, against the model's own logits."""

from __future__ import annotations

import math
from typing import Any

import sglang as sgl
import torch

from support.programs import Rig, same
from support.run import run

QUESTION = "Is the sea salty? "


@sgl.function
def program(s: Any, options: dict[str, Any]) -> None:
    s += QUESTION
    s += sgl.gen("answer", **{"temperature": 0, "max_tokens": 5, "return_logprob": True, **options})


def meta_of(rig: Rig, **options: Any) -> dict[str, Any]:
    meta: dict[str, Any] = rig.run(program, options).get_meta_info("answer")
    return meta


def drawn(rig: Rig) -> list[int]:
    return rig.complete(QUESTION, max_tokens=5).tokens


def close(actual: list[float], expected: list[float]) -> None:
    assert len(actual) == len(expected), (actual, expected)
    for ours, models in zip(actual, expected, strict=True):
        assert math.isclose(ours, models, abs_tol=1e-4), (actual, expected)


def probe_output_logprobs(rig: Rig) -> None:
    entries = meta_of(rig)["output_token_logprobs"]
    same([token for _, token, _ in entries], drawn(rig))
    close([logprob for logprob, _, _ in entries], rig.logprobs(rig.prompt(QUESTION), drawn(rig)))
    same({text for _, _, text in entries}, {None})


def probe_logprobs_are_the_models_own(rig: Rig) -> None:
    """Those of temperature 1 without filters, whatever the token was drawn with."""
    entries = meta_of(rig, temperature=1.7, top_k=9)["output_token_logprobs"]
    tokens = [token for _, token, _ in entries]
    close([logprob for logprob, _, _ in entries], rig.logprobs(rig.prompt(QUESTION), tokens))


def probe_no_logprobs_unasked(rig: Rig) -> None:
    for options in ({"return_logprob": None}, {"return_logprob": False, "top_logprobs_num": 3}):
        assert not [key for key in meta_of(rig, **options) if "logprob" in key]


def probe_top_logprobs(rig: Rig) -> None:
    meta = meta_of(rig, top_logprobs_num=3)
    tops = meta["output_top_logprobs"]
    same([len(top) for top in tops], [3] * 5)
    tokens = [*rig.prompt(QUESTION), *drawn(rig)]
    table = torch.log_softmax(run(rig.model, tokens), -1)
    for i, top in enumerate(tops):
        values, ids = table[len(tokens) - 5 + i - 1, : rig.engine.tokenizer.size].topk(3)
        same([token for _, token, _ in top], ids.tolist())
        close([logprob for logprob, _, _ in top], values.tolist())


def probe_texts_in_logprobs(rig: Rig) -> None:
    meta = meta_of(rig, top_logprobs_num=2, return_text_in_logprobs=True)
    decode = rig.engine.tokenizer.decode
    same([text for _, _, text in meta["output_token_logprobs"]], [decode([t]) for t in drawn(rig)])
    for top in meta["output_top_logprobs"]:
        same([text for _, _, text in top], [decode([token]) for _, token, _ in top])


def probe_prompt_logprobs(rig: Rig) -> None:
    tokens = rig.prompt(QUESTION)
    meta = meta_of(rig, logprob_start_len=5)
    entries = meta["input_token_logprobs"]
    same([token for _, token, _ in entries], tokens[5:])
    close([logprob for logprob, _, _ in entries], rig.logprobs(tokens[:5], tokens[5:]))
    same([token for _, token, _ in meta["output_token_logprobs"]], drawn(rig))


def probe_prompt_logprobs_from_the_start(rig: Rig) -> None:
    """As sglang's server: an entry for every token of the prompt, the first without a value."""
    tokens = rig.prompt(QUESTION)
    meta = meta_of(rig, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True)
    first, *entries = meta["input_token_logprobs"]
    same(first, [None, tokens[0], rig.engine.tokenizer.decode(tokens[:1])])
    same([token for _, token, _ in entries], tokens[1:])
    close([logprob for logprob, _, _ in entries], rig.logprobs(tokens[:1], tokens[1:]))
    tops = meta["input_top_logprobs"]
    same((len(tops), tops[0], {len(top) for top in tops[1:]}), (len(tokens), None, {2}))
    assert all(top[0][0] >= entry[0] for top, entry in zip(tops[1:], entries, strict=True))


def probe_prompt_logprobs_unasked(rig: Rig) -> None:
    same(meta_of(rig)["input_token_logprobs"], [])
    same(meta_of(rig, logprob_start_len=-1)["input_token_logprobs"], [])


def probe_logprobs_from_run(rig: Rig) -> None:
    @sgl.function
    def plain(s: Any) -> None:
        s += QUESTION + sgl.gen("answer", max_tokens=5)

    options = {"return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 10}
    meta = rig.run(plain, temperature=0, return_text_in_logprobs=True, **options).get_meta_info("answer")
    same(len(meta["input_token_logprobs"]), len(rig.prompt(QUESTION)) - 10)
    same([entry[1] for entry in meta["output_token_logprobs"]], drawn(rig))
    same([len(top) for top in meta["output_top_logprobs"]], [1] * 5)
    same([entry[2] is None for entry in meta["output_token_logprobs"]], [False] * 5)


def probe_logprobs_of_several(rig: Rig) -> None:
    metas = meta_of(rig, n=2, temperature=1.5, ignore_eos=True)
    for meta in metas:
        entries = meta["output_token_logprobs"]
        tokens = [token for _, token, _ in entries]
        close([logprob for logprob, _, _ in entries], rig.logprobs(rig.prompt(QUESTION), tokens))


def probe_too_many_alternatives(rig: Rig) -> None:
    error = rig.error(rig.run(program, {"top_logprobs_num": 1000}))
    assert "1000" in str(error), error
