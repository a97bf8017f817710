"""run_batch: every item as if it ran alone, in every way to call it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import sglang as sgl

from support.programs import Rig, same

PREFIX = "Translate the following line into the language of weavers, word by word and without comment: "
GEN = {"max_tokens": 3, "temperature": 0}


@sgl.function
def translate(s: Any, line: str, end: str = ".") -> None:
    s += PREFIX
    s += line + end + "\n"
    s += sgl.gen("x", **GEN)


def alone(rig: Rig, line: str, end: str = ".") -> str:
    return rig.complete(f"{PREFIX}{line}{end}\n", max_tokens=3).text


LINES = [f"line {i}" for i in range(4)]


def _texts(rig: Rig, **options: Any) -> None:
    expected = [alone(rig, line) for line in LINES]
    states = translate.run_batch([{"line": line} for line in LINES], backend=rig.backend, **options)
    same([state["x"] for state in states], expected)
    # The prefix is traced and cached before the items run, and no item computes it again.
    cached = [state.get_meta_info("x")["cached_tokens"] for state in states]
    same(cached, [len(rig.prompt(PREFIX))] * len(LINES))


def probe_batch_in_threads(rig: Rig) -> None:
    _texts(rig, num_threads="auto")


def probe_batch_in_one_thread(rig: Rig) -> None:
    _texts(rig, num_threads=1)


def probe_batch_in_three_threads(rig: Rig) -> None:
    _texts(rig, num_threads=3)


def probe_batch_with_progress_bar(rig: Rig) -> None:
    for threads in ("auto", 1):
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            translate.run_batch(
                [{"line": line} for line in LINES], backend=rig.backend, num_threads=threads, progress_bar=True
            )[-1].sync()
        assert f"{len(LINES)}/{len(LINES)}" in shown.getvalue(), shown.getvalue()


def probe_batch_as_generator(rig: Rig) -> None:
    expected = [alone(rig, line) for line in LINES]
    for threads in ("auto", 1):
        states = translate.run_batch(
            [{"line": line} for line in LINES], backend=rig.backend, num_threads=threads, generator_style=True
        )
        assert not isinstance(states, list)
        same([state["x"] for state in states], expected)


def probe_batch_of_tuples(rig: Rig) -> None:
    states = translate.run_batch([("a",), ("b", "!")], backend=rig.backend)
    same([state["x"] for state in states], [alone(rig, "a"), alone(rig, "b", "!")])


def probe_batch_of_wrong_tuples(rig: Rig) -> None:
    for wrong in ([()], [("a", "b", "c")], [("a",), ()]):
        try:
            translate.run_batch(wrong, backend=rig.backend)
        except Exception as error:
            same(str(error), "Given arguments mismatch the SGL function signature")
        else:
            raise AssertionError(f"{wrong} was accepted")


def probe_batch_of_wrong_dicts(rig: Rig) -> None:
    for wrong in ([{"lines": "a"}], [{"line": "a"}, {}], [{"line": "a"}, {"line": "b", "extra": 1}]):
        try:
            translate.run_batch(wrong, backend=rig.backend)
        except TypeError as error:
            assert "argument" in str(error), error
        else:
            raise AssertionError(f"{wrong} was accepted")


def probe_batch_of_nothing(rig: Rig) -> None:
    same(translate.run_batch([], backend=rig.backend), [])


def probe_batch_of_one(rig: Rig) -> None:
    """One item: nothing is traced, nothing is cached before."""
    (state,) = translate.run_batch([{"line": "a"}], backend=rig.backend)
    same((state["x"], state.get_meta_info("x")["cached_tokens"]), (alone(rig, "a"), 0))


def probe_batch_of_the_same(rig: Rig) -> None:
    """Items without any difference come at the same moment, and all of them are answered."""
    states = translate.run_batch([{"line": "same"}] * 8, backend=rig.backend)
    same([state["x"] for state in states], [alone(rig, "same")] * 8)
    metas = [state.get_meta_info("x") for state in states]
    whole = len(rig.prompt(f"{PREFIX}same.\n"))
    same(sorted(meta["cached_tokens"] for meta in metas), [len(rig.prompt(PREFIX)), *[whole] * 7])


def probe_batch_with_a_short_prefix(rig: Rig) -> None:
    @sgl.function
    def short(s: Any, line: str) -> None:
        s += "Q: " + line
        s += sgl.gen("x", **GEN)

    states = short.run_batch([{"line": line} for line in LINES], backend=rig.backend)
    same([state["x"] for state in states], [rig.complete(f"Q: {line}", max_tokens=3).text for line in LINES])
    same([state.get_meta_info("x")["cached_tokens"] for state in states], [0] * len(LINES))


def probe_batch_with_options(rig: Rig) -> None:
    @sgl.function
    def plain(s: Any, line: str) -> None:
        s += line + sgl.gen("x")

    states = plain.run_batch(
        [{"line": line} for line in LINES],
        backend=rig.backend,
        max_new_tokens=3,
        temperature=0,
        return_logprob=True,
    )
    same([len(state.get_meta_info("x")["output_token_logprobs"]) for state in states], [3] * len(LINES))
    same([state["x"] for state in states], [rig.complete(line, max_tokens=3).text for line in LINES])


def probe_batch_with_a_failing_item(rig: Rig) -> None:
    """An item the backend refuses has its error; the others are answered."""
    choices = [["a", "b"], [], ["c", "d"]]

    @sgl.function
    def picking(s: Any, options: Any) -> None:
        s += "Pick " + sgl.select("x", options)

    states = picking.run_batch([{"options": options} for options in choices], backend=rig.backend)
    assert "choices" in str(rig.error(states[1])), states[1].error()
    same([state.error() for state in (states[0], states[2])], [None, None])
    assert states[0]["x"] in "ab" and states[2]["x"] in "cd"


def probe_batch_of_chats(rig: Rig) -> None:
    @sgl.function
    def chat(s: Any, question: str) -> None:
        s += sgl.system("You are a loom in a weaver's house, and you answer in as few threads as you can.")
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("x", **GEN))

    states = chat.run_batch([{"question": line} for line in LINES], backend=rig.backend)
    system = "You are a loom in a weaver's house, and you answer in as few threads as you can."
    for state, line in zip(states, LINES, strict=True):
        prompt = f"{system}<｜User｜>{line}<｜Assistant｜></think>"
        same(state["x"], rig.complete(prompt, max_tokens=3).text)
        # Traced up to the argument: the user's mark is part of the prefix.
        same(state.get_meta_info("x")["cached_tokens"], len(rig.prompt(f"{system}<｜User｜>")))
