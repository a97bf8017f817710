"""Joining texts: what was drawn keeps its tokens, what was read is encoded as one."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from support.executor import GEN, run
from support.programs import Rig, babbling_model, shared_engine
from weft.backend.executor import ProgramError


@sgl.function
def joining(s: Any) -> Any:
    s += "Once up"
    forks = s.fork(3)
    forks += lambda i: f"on {i}" + sgl.gen("x", **GEN) + ". "
    drawn = [fork["x"] for fork in forks]
    metas = [fork.get_meta_info("x") for fork in forks]
    forks.join("concate_and_append")
    s += "So" + sgl.gen("last", **GEN)
    return drawn, metas


def test_a_joined_text_has_the_tokens_that_were_drawn() -> None:
    """Of sglang's interpreter only the first child's stay: the others' are read from their text, which may have no
    such text (half a character) or other tokens."""
    ended = run(joining)
    drawn, _ = ended.value
    rig = Rig(shared_engine(), babbling_model())
    tokens, encode = rig.prompt("Once up"), rig.engine.tokenizer.encode
    for i, text in enumerate(drawn):
        output = rig.complete([*rig.prompt("Once up"), *encode(f"on {i}")], max_tokens=8)
        assert output.text == text
        tokens += [*encode(f"on {i}"), *output.tokens, *encode(". ")]
    assert ended["last"] == rig.complete([*tokens, *encode("So")], max_tokens=8).text
    assert ended.text() == "Once up" + "".join(f"on {i}{x}. " for i, x in enumerate(drawn)) + f"So{ended['last']}"
    rig.backend.shutdown()


def test_only_the_texts_are_joined() -> None:
    ended = run(joining)
    assert "x" not in ended.state and len(ended.value[1]) == 3


def test_a_failed_child_fails_the_join_of_texts() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Once "
        forks = s.fork(2)
        forks[0] += sgl.gen("x", **GEN)
        forks[1] += sgl.gen("odd", temperature=-1)
        forks.join("concate_and_append")

    with pytest.raises(ProgramError) as caught:
        run(program)
    assert caught.value.path == "/1" and set(caught.value.partial[0]) == {"x"}
