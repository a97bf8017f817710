"""stream=True: pieces join to what a plain run gives, whole or by variable, in threads and in asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import sglang as sgl

from support.engine import wait_for
from support.programs import Rig, reciting, same
from weft.runtime.errors import RequestError

T = TypeVar("T")
GEN = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


@sgl.function
def two(s: Any, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant("A: " + sgl.gen("a", **GEN))
    s += sgl.user("More.")
    s += sgl.assistant(sgl.gen("b", **GEN) + "!")


def stream(rig: Rig, program: Any = two, *args: Any, **options: Any) -> Any:
    return program.run(*(args or ("Why?",)), backend=rig.backend, stream=True, **options)


class Door:
    """Lets no gen end before its reader is there: text_iter(name) gives nothing once the program has ended."""

    def __init__(self, rig: Rig) -> None:
        self._readers = threading.Semaphore(0)
        stream_of_the_backend = rig.backend.generate_stream

        def generate_stream(s: Any, sampling_params: Any) -> Iterator[Any]:
            yield from stream_of_the_backend(s, sampling_params)
            assert self._readers.acquire(timeout=30), "nobody reads"

        rig.backend.generate_stream = generate_stream

    def read(self, pieces: Iterator[str]) -> str:
        first = next(pieces)
        self._readers.release()
        return first + "".join(pieces)

    async def gather(self, pieces: AsyncIterator[T]) -> list[T]:
        gathered = [await anext(pieces)]
        self._readers.release()
        return gathered + [piece async for piece in pieces]


def finish(state: Any) -> None:
    """Wait for the end of the program's own thread, too."""
    wait_for(lambda: state.stream_executor.is_finished)


def probe_text_iter(rig: Rig) -> None:
    plain = rig.run(two, "Why?")
    state = stream(rig)
    pieces = list(state.text_iter())
    same("".join(pieces), plain.text())
    assert all(pieces) and len(pieces) > 1, pieces
    same((state["a"], state["b"]), (plain["a"], plain["b"]))
    same(state.messages(), plain.messages())


def probe_text_iter_of_variables(rig: Rig) -> None:
    plain = rig.run(two, "Why?")
    door, state = Door(rig), stream(rig)
    same([door.read(state.text_iter(name)) for name in "ab"], [plain["a"], plain["b"]])
    same(state.text(), plain.text())


def probe_text_iter_without_streaming(rig: Rig) -> None:
    state = rig.run(two, "Why?")
    same((list(state.text_iter()), list(state.text_iter("b"))), ([state.text()], [state["b"]]))


def probe_text_async_iter(rig: Rig) -> None:
    async def main() -> str:
        return "".join([piece async for piece in stream(rig).text_async_iter()])

    same(asyncio.run(main()), rig.run(two, "Why?").text())


def probe_text_async_iter_of_variables(rig: Rig) -> None:
    async def main() -> list[str]:
        door, state = Door(rig), stream(rig)
        return ["".join(await door.gather(state.text_async_iter(name))) for name in "ab"]

    plain = rig.run(two, "Why?")
    same(asyncio.run(main()), [plain["a"], plain["b"]])


def probe_meta_data_while_streaming(rig: Rig) -> None:
    async def main() -> list[tuple[str, dict[str, Any]]]:
        return await door.gather(state.text_async_iter("a", return_meta_data=True))

    plain = rig.run(two, "Why?")
    door, state = Door(rig), stream(rig)
    pairs = asyncio.run(main())
    door.read(state.text_iter("b"))
    same("".join(piece for piece, _ in pairs), plain["a"])
    counts = [meta["completion_tokens"] for _, meta in pairs]
    same(counts, sorted(counts))
    assert counts[0] >= 1 and counts[-1] <= 6, counts
    same({meta["prompt_tokens"] for _, meta in pairs}, {plain.get_meta_info("a")["prompt_tokens"]})
    same(len({meta["id"] for _, meta in pairs}), 1)
    finish(state)
    final = state.get_meta_info("a")
    same((final["completion_tokens"], final["finish_reason"]), (6, {"type": "length", "length": 6}))


def probe_logprobs_while_streaming(rig: Rig) -> None:
    """The last meta information is complete, whatever pieces the reader saw."""
    asked = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 3}
    plain = rig.run(two, "Why?", **asked).get_meta_info("b")
    state = stream(rig, **asked)
    same(bool("".join(state.text_iter())), True)
    meta = state.get_meta_info("b")
    for key in ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs"):
        same((key, meta[key]), (key, plain[key]))


def probe_stops_while_streaming(_: Rig) -> None:
    """No piece shows what belongs to a stop string or half a character, and what only began like one comes."""

    @sgl.function
    def program(s: Any, question: str) -> None:
        s += question + sgl.gen("x", max_tokens=20, temperature=0, stop=["bcX", "fg", "ö!"])

    with reciting(":abcdöefgh") as own:
        door, state = Door(own), stream(own, program, "go:")
        same(door.read(state.text_iter("x")), "abcdöe")
        same(state.get_meta_info("x")["finish_reason"], {"type": "stop", "matched": "fg"})
        finish(state)


def probe_fork_while_streaming(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, question: str) -> None:
        s += question
        s.sync()
        children = s.fork(2)
        children += lambda i: f" {i}:" + sgl.gen("x", **GEN)
        children.join()
        s += " so" + sgl.gen("y", **GEN)

    plain = rig.run(program, "Why?")
    state = stream(rig, program)
    same("".join(state.text_iter()), plain.text())
    same((state["x"], state["y"]), (plain["x"], plain["y"]))


def probe_select_while_streaming(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, question: str) -> None:
        s += question + sgl.select("pick", ["yes", "no"]) + "." + sgl.gen("x", **GEN)

    plain = rig.run(program, "Why?")
    state = stream(rig, program)
    same("".join(state.text_iter()), plain.text())
    same(state["pick"], plain["pick"])


def probe_error_while_streaming(rig: Rig) -> None:
    """The pieces end, and the state tells why."""

    @sgl.function
    def program(s: Any, question: str) -> None:
        s += question + sgl.gen("a", **GEN)
        s += sgl.gen("b", regex="x(?=y)")

    state = stream(rig, program)
    assert "".join(state.text_iter()).startswith("Why?")
    error = rig.error(state)
    assert isinstance(error, RequestError), repr(error)
    same(error.field, "regex")


def probe_streams_side_by_side(rig: Rig) -> None:
    async def read(state: Any) -> str:
        return "".join([piece async for piece in state.text_async_iter()])

    async def main() -> list[str]:
        states = [stream(rig, two, f"Why {i}?") for i in range(3)]
        return list(await asyncio.gather(*map(read, states)))

    same(asyncio.run(main()), [rig.run(two, f"Why {i}?").text() for i in range(3)])
