"""The programs that sglang tests itself with, from its own wheel: the same through interpreter and executor.

Their asserts ask for knowledge that the embedded model does not have; here both have to do the same, greedily.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest
import sglang as sgl
from sglang.lang import ir
from sglang.test import test_programs as theirs

from support.programs import guarded
from weft.backend.executor import ProgramError, ProgramExecutor
from weft.backend.language import DeepSeekV4Backend
from weft.runtime.engine.front import Engine

STOCK = ir.SglFunction.run
CASES: dict[str, tuple[Any, ...]] = {
    "test_few_shot_qa": (),
    "test_mt_bench": (),
    "test_select": (False,),
    "test_decode_int": (),
    "test_decode_json_regex": (),
    "test_decode_json": (),
    "test_expert_answer": (False,),
    "test_tool_use": (),
    "test_react": (),
    "test_parallel_decoding": (),
    "test_parallel_encoding": (False,),
    "test_image_qa": (),
    "test_stream": (),
    "test_regex": (),
    "test_dtype_gen": (),
    "test_hellaswag_select": (),
}
# Not here: speculation by remote chat APIs, which is refused (`probes_refused.py`), and one that loads sglang's
# server part only to count tokens (`probes_gen.py` has min_tokens).
OTHERS = {"test_completion_speculative", "test_chat_completion_speculative", "test_gen_min_new_tokens"}
HELLASWAG = [
    {
        "activity_label": "Weaving",
        "ctx": f"She takes {n} threads and",
        "endings": ["ties", "cuts", "dyes"],
        "label": 1,
    }
    for n in range(24)
]


@cache
def engine() -> Engine:
    return Engine.embedded()


class Compared:
    """Runs everything twice."""

    def __init__(self, backend: DeepSeekV4Backend) -> None:
        self.backend = backend
        self.begun = self.ended = 0
        self.differences: list[Any] = []

    def run(self, program: Any, *args: Any, stream: bool = False, **kwargs: Any) -> Any:
        kwargs["temperature"] = 0
        kwargs["max_new_tokens"] = min(kwargs.get("max_new_tokens", 48), 48)
        self.begun += 1
        state, stock = None, None
        try:
            state = STOCK(program, *args, **kwargs, backend=self.backend, stream=stream)
            state.sync()
            stock = self._of(state)
        except Exception as error:  # the program's own
            stock = repr(error)
        with ProgramExecutor(engine()) as executor:
            try:
                own = self._of(asyncio.run(executor.run(program, *args, **kwargs)).state)
            except Exception as error:
                own = repr(error.__cause__ if isinstance(error, ProgramError) else error)
        self.ended += 1
        if own != stock:
            self.differences.append((program.func.__name__, stock, own))
        return state

    @staticmethod
    def _of(state: Any) -> Any:
        if state.error() is not None:
            return repr(state.error())
        variables = dict(state.stream_executor.variables)
        variables.pop(None, None)  # sglang keeps the last text without a name
        return state.text(), state.messages(), variables

    def run_batch(self, program: Any, batch: Any, **kwargs: Any) -> list[Any]:
        return [self.run(program, **own) for own in batch]


def test_every_case_is_named() -> None:
    assert {name for name in vars(theirs) if name.startswith("test_")} == CASES.keys() | OTHERS


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("name", CASES)
def test_both_do_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DeepSeekV4Backend(engine())
    both = Compared(backend)
    monkeypatch.setattr(ir.SglFunction, "run", lambda program, *a, **k: both.run(program, *a, **k))
    monkeypatch.setattr(ir.SglFunction, "run_batch", lambda program, *a, **k: both.run_batch(program, *a, **k))
    monkeypatch.setattr(theirs, "download_and_cache_file", lambda url: url)
    monkeypatch.setattr(theirs, "read_jsonl", lambda name: HELLASWAG)
    sgl.set_default_backend(backend)
    asked: Exception | None = None
    try:
        guarded(lambda: getattr(theirs, name)(*CASES[name]))
    except Exception as error:  # what it asks of the answers
        asked = error
    finally:
        guarded(backend.shutdown)
        sgl.set_default_backend(None)
    assert both.begun == both.ended > 0 and "hangs" not in str(asked)
    if name == "test_image_qa":  # sglang looks for the file before it asks whether images are served
        ((_, stock, own),) = both.differences
        assert stock.startswith("FileNotFoundError") and own.startswith("UnsupportedError")
    else:
        assert both.differences == []
