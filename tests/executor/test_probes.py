"""The probes of sglang's interpreter, run by the executor: the same programs, the same results.

`SglFunction.run` and `run_batch` are led to the executor, so a probe's every form goes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from sglang.lang import ir

from support.programs import Rig, babbling_model, guarded, probes, shared_engine
from weft.backend.executor import Piece, ProgramError, ProgramExecutor
from weft.runtime.errors import UnsupportedError

# What asks for the machinery of sglang itself, or for what a fault of it gives.
OTHERS = {
    "text_iter": "pieces are those of `ProgramExecutor.stream`",
    "text_iter_of_variables": "as above",
    "text_iter_without_streaming": "as above",
    "text_async_iter": "as above",
    "text_async_iter_of_variables": "as above",
    "streamed": "as above",
    "streams_side_by_side": "as above",
    "fork_while_streaming": "as above",
    "select_while_streaming": "as above",
    "stops_while_streaming": "as above",
    "logprobs_while_streaming": "as above",
    "meta_data_while_streaming": "as above",
    "error_while_streaming": "as above",
    "several_streams_are_refused": "n > 1 streams the first",
    "default_backend": "an executor is told its engine",
    "program_in_a_program": "within a run, `State.gather` runs programs; `SglFunction.run` blocks the loop",
    "batch_of_wrong_tuples": "a batch takes mappings",
    "batch_of_wrong_dicts": "each item's error is in its place: `test_faults.py`",
    "wrong_arguments": "a RequestError that names the argument",
    "without_threads": "errors are ProgramErrors",
    "join_kv": "there is no hook: a join keeps drawn tokens",
    "join_text": "tokens of all children stay, not those of the first only: `test_joins.py`",
    "batch_with_progress_bar": "progress is a callback",
    "separate_reasoning_in_a_role": "text before the reasoning stays: `test_executor.py`",
    "separate_reasoning_outside_a_role": "the answer is there once: `test_executor.py`",
}
# Where the results are the same, but not how many tokens were cached.
COUNTS = {
    "meta_info_by_name": "a state goes on in its own sequence: its last token was not computed yet, so not cached",
    "same_text_in_every_child": "children compute side by side",
    "batch_in_one_thread": "no program is traced to cache a prefix: the first computes it, and more may be known",
    "batch_in_threads": "as above",
    "batch_in_three_threads": "as above",
    "batch_of_chats": "as above",
    "batch_of_the_same": "as above",
}
_COUNTED = r"got \[?\d[\d, ]*\]?\nexpected \[?\d[\d, ]*\]?$"
NAMES = sorted(probes().keys() - OTHERS)


class Ended:
    """A run as `program.run` gives it: its state, with the error if it failed."""

    def __init__(self, state: Any, error: Exception | None, value: Any) -> None:
        self._state, self._error, self.ret_value = state, error, value

    def error(self) -> Exception | None:
        return self._error

    def sync(self) -> None:
        pass

    def text_iter(self) -> list[str]:
        return [self._state.text()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def __getitem__(self, name: str) -> Any:
        return self._state[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._state[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._state


class Executing(Rig):
    """A rig whose programs the executor runs."""

    def error(self, state: Any) -> Exception:
        error = state.error()
        if isinstance(error, ProgramError):
            error = error.__cause__
        assert isinstance(error, Exception), "no error"
        return error


async def streamed(executor: ProgramExecutor, program: Any, args: Any, kwargs: Any) -> Any:
    """The run; its pieces join to its variables."""
    pieces: dict[tuple[str, str | None], list[str]] = {}
    async for item in executor.stream(program, *args, **kwargs):
        if not isinstance(item, Piece):
            for (path, name), own in pieces.items():
                assert path or name is None or "".join(own) == item[name]
            return item
        pieces.setdefault((item.path, item.variable), []).append(item.text)
    raise AssertionError("a stream ends with the run, or an exception")


def executor_of(backend: Any) -> ProgramExecutor:
    return ProgramExecutor(backend.engine, thinking=backend.chat_template.name.endswith("thinking"))


def run(
    program: Any, *args: Any, backend: Any, stream: bool = False, use_thread: bool = True, **kwargs: Any
) -> Ended:
    with executor_of(backend) as executor:
        try:
            made = streamed(executor, program, args, kwargs) if stream else executor.run(program, *args, **kwargs)
            ended = asyncio.run(made)
        except (ProgramError, UnsupportedError) as error:
            return Ended(None, error, None)
        return Ended(ended.state, None, ended.value)


def run_batch(
    program: Any,
    batch: Any,
    *,
    backend: Any,
    num_threads: str | int = "auto",
    progress_bar: bool = False,
    generator_style: bool = False,
    **options: Any,
) -> Any:
    if isinstance(num_threads, int):
        options["concurrency"] = num_threads
    items = [own if isinstance(own, dict) else dict(zip(program.arg_names, own, strict=False)) for own in batch]
    with executor_of(backend) as executor:
        ended = asyncio.run(executor.batch(program, items, **options))
    states = [Ended(None, e, None) if isinstance(e, Exception) else Ended(e.state, None, e.value) for e in ended]
    return iter(states) if generator_style else states


@pytest.mark.parametrize("name", NAMES)
def test_probe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(name)
    monkeypatch.setattr("support.programs.Rig", Executing)
    monkeypatch.setattr(ir.SglFunction, "run", run)
    monkeypatch.setattr(ir.SglFunction, "run_batch", run_batch)
    made = Executing(shared_engine(), babbling_model())
    made.backend.flush_cache()
    differs = contextlib.nullcontext() if name not in COUNTS else pytest.raises(AssertionError, match=_COUNTED)
    try:
        with differs:
            guarded(lambda: probes()[name](made), 20)
    finally:
        guarded(made.backend.shutdown)
