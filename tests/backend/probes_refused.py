"""What this version does not serve is refused by name, and what is wrong is refused with field and value."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import sglang as sgl

from support.programs import Rig, same
from weft.runtime.errors import RequestError, UnsupportedError

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@sgl.function
def program(s: Any, expression: Any) -> None:
    s += "Give me "
    s += expression


def refusal(rig: Rig, expression: Any, **options: Any) -> RequestError:
    error = rig.error(rig.run(program, expression, **options))
    assert isinstance(error, RequestError), repr(error)
    return error


def unsupported(rig: Rig, field: str, expression: Any) -> None:
    error = refusal(rig, expression)
    assert isinstance(error, UnsupportedError), repr(error)
    same(error.field, field)
    assert str(error).startswith(f"{field} = "), error


def probe_grammars_that_are_none(rig: Rig) -> None:
    for field, value in (
        ("regex", "a(?=b)b"),
        ("json_schema", '{"type": "array", "uniqueItems": true}'),
        ("json_schema", "{"),
        ("dtype", "complex"),
    ):
        error = refusal(rig, sgl.gen("x", max_tokens=8, **{field: value}))
        same(error.field, field)
        same(error.value, value)
    assert "uniqueItems" in str(refusal(rig, sgl.gen("x", json_schema='{"uniqueItems": true, "type": "array"}')))
    same(refusal(rig, sgl.gen("x", regex="a", json_schema="{}")).field, "regex")


def probe_images_are_refused(rig: Rig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pixel.png"
        path.write_bytes(base64.b64decode(_PIXEL))
        for call in (sgl.gen("x", max_tokens=2), sgl.select("x", ["a", "b"])):
            unsupported(rig, "image", sgl.image(str(path)) + call)

        @sgl.function
        def forking(s: Any) -> None:
            s += sgl.user("Look: " + sgl.image(str(path)))
            s.sync()
            s.fork(2)

        assert isinstance(rig.error(rig.run(forking)), UnsupportedError)


def probe_api_speculation_is_refused(rig: Rig) -> None:
    @sgl.function(num_api_spec_tokens=16)
    def outside(s: Any) -> None:
        s += "Name: " + sgl.gen("x", max_tokens=4, stop="\n")

    @sgl.function(num_api_spec_tokens=16)
    def inside(s: Any) -> None:
        s += sgl.user("Your name?") + sgl.assistant("It is " + sgl.gen("x", max_tokens=4))

    for speculating in (outside, inside):
        error = rig.error(rig.run(speculating))
        assert isinstance(error, UnsupportedError), repr(error)
        same(error.field, "num_api_spec_tokens")


def probe_several_streams_are_refused(rig: Rig) -> None:
    state = rig.run(program, sgl.gen("x", n=2, max_tokens=2), stream=True)
    same("".join(state.text_iter()), "Give me ")
    error = rig.error(state)
    assert isinstance(error, UnsupportedError), repr(error)
    same((error.field, error.value), ("n", 2))


def probe_wrong_values_name_their_field(rig: Rig) -> None:
    wrong = {
        "temperature": -1.0,
        "top_p": 0.0,
        "top_k": 0,
        "min_p": 2.0,
        "frequency_penalty": 3.0,
        "presence_penalty": -3.0,
        "min_tokens": 40,
        "max_tokens": -1,
        "stop": ["a", ""],
        "n": 0,
    }
    for name, value in wrong.items():
        error = refusal(rig, sgl.gen("x", **{"max_tokens": 4, name: value}))
        same((name, str(error).split(" = ")[0]), (name, name))
    same(refusal(rig, sgl.gen("x", stop=["a", 5])).field, "stop")


def probe_wrong_selects(rig: Rig) -> None:
    same(refusal(rig, sgl.select("x", ["a", "b"], temperature=0.5)).field, "temperature")
    same(refusal(rig, sgl.gen("x", choices=["a", "b"], temperature=1)).field, "temperature")
    same(refusal(rig, sgl.select("x", [])).field, "choices")
    same(refusal(rig, sgl.select("x", ["a", ""])).field, "choices")


def probe_too_long_for_the_context(rig: Rig) -> None:
    error = refusal(rig, "w" * 2000 + sgl.gen("x", max_tokens=4))
    assert "the context holds 1024" in str(error), error
    error = refusal(rig, sgl.gen("x", max_tokens=1020))
    assert "the context holds 1024" in str(error), error


def probe_a_program_goes_on_after_a_refusal(rig: Rig) -> None:
    """An error ends its own state only: the next program on the backend is as if nothing had happened."""

    @sgl.function
    def plain(s: Any) -> None:
        s += "Give me " + sgl.gen("x", max_tokens=6, temperature=0)

    expected = rig.run(plain)["x"]
    refusal(rig, sgl.gen("x", regex="a(?=b)"))
    refusal(rig, "w" * 2000 + sgl.gen("x"))
    same(rig.run(plain)["x"], expected)
