"""DeepSeek-V4's layout as an sglang template, and what becomes of sglang's parameters and results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.lang.ir import REGEX_BOOL, REGEX_INT, SglSamplingParams

from weft.backend.convert import (
    count_of,
    finish_reason,
    plain_int,
    sampling_params,
    strings,
    token_entry,
    top_entries,
)
from weft.backend.template import DeepSeekV4Template
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError


def talk(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": role[0].upper()} for role in roles]


EOS = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (talk("user"), "<｜User｜>U"),
        (talk("system", "user"), "S<｜User｜>U"),
        (talk("user", "user", "user"), "<｜User｜>U\n\nU\n\nU"),
        (talk("user", "assistant", "user"), f"<｜User｜>U<｜Assistant｜></think>A{EOS}<｜User｜>U"),
        (talk("user", "assistant", "assistant"), f"<｜User｜>U{f'<｜Assistant｜></think>A{EOS}' * 2}"),
        (talk("user", "system", "user"), "<｜User｜>US<｜User｜>U"),
    ],
)
def test_prompts(messages: list[dict[str, Any]], prompt: str) -> None:
    assert DeepSeekV4Template().get_prompt(messages) == prompt


def test_thinking_opens_the_turn() -> None:
    plain, thinking = DeepSeekV4Template(), DeepSeekV4Template(thinking=True)
    assert thinking.get_prompt(talk("user", "assistant")) == f"<｜User｜>U<｜Assistant｜><think>A{EOS}"
    assert (plain.name, thinking.name) == ("deepseek-v4", "deepseek-v4-thinking")


def test_no_stop_strings_and_no_default_system_prompt() -> None:
    """sglang would put the strings into the caller's own list."""
    template = DeepSeekV4Template()
    assert not template.stop_str
    assert template.default_system_prompt is None


# -- parameters --------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert sampling_params(SglSamplingParams()) == SamplingParams()


def test_every_field_arrives() -> None:
    ours = sampling_params(
        SglSamplingParams(
            max_new_tokens=9,
            min_new_tokens=2,
            stop=["a", "b"],
            stop_token_ids=[7],
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            frequency_penalty=0.2,
            presence_penalty=-0.3,
            ignore_eos=True,
            return_logprob=True,
            top_logprobs_num=3,
        )
    )
    assert ours == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        stop=("a", "b"),
        stop_token_ids=(7,),
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        ignore_eos=True,
        logprobs=3,
    )


def test_stop_regex_of_later_versions() -> None:
    params = SglSamplingParams()
    params.stop_regex = "a+"
    assert sampling_params(params).stop_regex == ("a+",)
    params.stop_regex = ["a+", "b"]
    assert sampling_params(params).stop_regex == ("a+", "b")


@pytest.mark.parametrize(
    ("asked", "top", "logprobs"),
    [(None, 5, None), (False, 5, None), (True, None, 0), (True, (None,), 0), (True, 0, 0), (True, 2, 2)],
)
def test_logprobs(asked: bool | None, top: Any, logprobs: int | None) -> None:
    params = SglSamplingParams(return_logprob=asked, top_logprobs_num=top)
    assert sampling_params(params).logprobs == logprobs


def test_grammars() -> None:
    def grammar(**fields: Any) -> Grammar | None:
        return sampling_params(SglSamplingParams(**fields), thinking=True).grammar

    assert grammar() is None
    assert grammar(regex="a+") == Grammar("regex", "a+", thinking=True)
    assert grammar(json_schema="{}") == Grammar("json_schema", "{}", thinking=True)
    assert grammar(dtype=int) == grammar(dtype="int") == Grammar("regex", REGEX_INT, thinking=True)
    assert grammar(dtype="bool", regex="a") == Grammar("regex", REGEX_BOOL, thinking=True)
    assert sampling_params(SglSamplingParams(dtype=float, stop="x")).stop == ("x", " ", "\n")
    for field, value in (("dtype", "x"), ("regex", 5), ("json_schema", {"type": "string"})):
        with pytest.raises(RequestError) as caught:
            grammar(**{field: value})
        assert (caught.value.field, caught.value.value) == (field, value)


def test_strings() -> None:
    assert strings("stop", None) == ()
    assert strings("stop", "ab") == ("ab",)
    assert strings("stop", ("a", "b")) == ("a", "b")
    with pytest.raises(RequestError, match="stop"):
        strings("stop", ["a", None])


def test_numbers() -> None:
    assert [plain_int(value) for value in (3, 0, None, (None,), True, "3")] == [3, 0, None, None, None, None]
    assert count_of(SimpleNamespace(n=2)) == 2
    assert count_of(SimpleNamespace()) == 1
    for wrong in (0, -1, None, 1.5):
        with pytest.raises(RequestError, match="n = "):
            count_of(SimpleNamespace(n=wrong))


# -- results -----------------------------------------------------------------------------------------------


def test_entries() -> None:
    logprob = m.Logprob(5, -0.25, [(6, -0.5), (5, -0.25)])
    assert token_entry(logprob, None) == [-0.25, 5, None]
    assert token_entry(logprob, str) == [-0.25, 5, "5"]
    assert top_entries(logprob, str) == [[-0.5, 6, "6"], [-0.25, 5, "5"]]


def test_finish_reasons() -> None:
    def done(reason: str, stop: Any) -> m.Done:
        return m.Done(call=1, usage=m.Usage(generated=4), length=9, finish_reason=reason, stop=stop)

    assert finish_reason(done("length", None)) == {"type": "length", "length": 4}
    assert finish_reason(done("stop", "\n")) == {"type": "stop", "matched": "\n"}
    assert finish_reason(done("stop", 1)) == {"type": "stop", "matched": 1}
