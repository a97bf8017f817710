"""regex, json_schema and dtype, in every form that a program can ask for them."""

from __future__ import annotations

import json
import re
from typing import Any

import sglang as sgl
from sglang.lang.ir import REGEX_BOOL, REGEX_FLOAT, REGEX_INT, REGEX_STR

from support.programs import Rig, reciting, same
from weft.runtime.text.tokens import EOS

_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [1, 20, 300]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


_BEGUN = {int: r"[-+]?[0-9]*", float: r"[-+]?[0-9]*\.?[0-9]*", str: r"\"[^\"]*", bool: "(True|False)"}


@sgl.function
def program(s: Any, expression: Any) -> None:
    s += "Give me "
    s += expression
    s += "."


def text_of(rig: Rig, expression: Any, **options: Any) -> str:
    state = rig.run(program, expression, **options)
    assert state.error() is None, state.error()
    text: str = state["x"]
    same(state.text(), f"Give me {text}.")
    return text


def probe_regex(rig: Rig) -> None:
    for regex in ("(yes|no)", "[a-c]{3,5}x", "[0-9]{4}-[0-9]{2}-[0-9]{2}"):
        for temperature in (0, 1.0):
            text = text_of(rig, sgl.gen("x", max_tokens=24, regex=regex, temperature=temperature))
            assert re.fullmatch(regex, text), text


def probe_json_schema(rig: Rig) -> None:
    for temperature in (0, 1.0):
        text = text_of(rig, sgl.gen("x", max_tokens=96, json_schema=_SCHEMA, temperature=temperature))
        found = json.loads(text)
        assert list(found) == ["name", "age"] and found["age"] in (1, 20, 300) and len(found["name"]) <= 6, text


def probe_dtypes(rig: Rig) -> None:
    for dtype, regex in ((int, REGEX_INT), (float, REGEX_FLOAT), (bool, REGEX_BOOL), (str, REGEX_STR)):
        for asked in (dtype, dtype.__name__):
            expression = sgl.gen("x", max_tokens=12, dtype=asked, temperature=0)
            text = text_of(rig, expression)
            # Random weights rarely end a number or a string, so it may be cut, in a character too.
            assert re.fullmatch(regex, text) or re.fullmatch(_BEGUN[dtype], text), (dtype, text)


def probe_gen_int_and_gen_string(rig: Rig) -> None:
    assert re.fullmatch(r"[-+]?[0-9]*[ \n]*", text_of(rig, sgl.gen_int("x", max_tokens=4, temperature=0)))
    assert text_of(rig, sgl.gen_string("x", max_tokens=4, temperature=0)).startswith('"')


def probe_several_at_once(rig: Rig) -> None:
    state = rig.run(program, sgl.gen("x", max_tokens=8, n=3, regex="[ab]{2}c", temperature=1.0))
    assert state.error() is None
    assert all(re.fullmatch("[ab]{2}c", text) for text in state["x"]), state["x"]


def probe_streamed(rig: Rig) -> None:
    state = rig.run(program, sgl.gen("x", max_tokens=24, regex="[a-c]{3,9}x", temperature=0), stream=True)
    plain = text_of(rig, sgl.gen("x", max_tokens=24, regex="[a-c]{3,9}x", temperature=0))
    same("".join(state.text_iter()), f"Give me {plain}.")


def probe_stops_end_it_earlier(rig: Rig) -> None:
    assert text_of(rig, sgl.gen("x", max_tokens=9, regex="ab+c", stop="b", temperature=0)) == "a"


def probe_reasoning_comes_before_the_grammar(_: Rig) -> None:
    """In a thinking turn it holds behind `</think>`, with separate_reasoning and without; else from the start."""

    @sgl.function
    def asking(s: Any, separate: bool) -> None:
        s += sgl.user("Sure?")
        answer = sgl.gen("x", max_tokens=20, temperature=0, regex="(Never|No)")
        s += sgl.assistant(sgl.separate_reasoning(answer, model_type="deepseek-r1") if separate else answer)

    with reciting(f"<think>Hm.</think>Nope{EOS}", thinking=True) as own:
        same(own.run(asking, False)["x"], "Hm.</think>No")
        state = own.run(asking, True)
        same((state["x"], state["x_reasoning_content"]), ("No", "Hm."))
        streamed = own.run(asking, False, stream=True)
        assert "".join(streamed.text_iter()).endswith(f"<think>Hm.</think>No{EOS}")
    with reciting(f"</think>Nope{EOS}") as own:
        same(own.run(asking, False)["x"], "No")
