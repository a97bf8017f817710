"""sglang programs on a small model, in the installed sglang or in the newest one.

A probe is a function `probe_<name>(rig)` in a file `tests/backend/probes_<topic>.py`. It uses nothing but sglang
and this module, so `test_probes.py` can run it here and, in one process of its own, under the light install of
the newest sglang that `make test` keeps beside the pinned one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from support.engine import byte_tokenizer, core_of, is_empty, small_config, small_model, wait_for
from support.run import run
from weft.backend.language import DeepSeekV4Backend
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.model.model import Model

T = TypeVar("T")
TESTS = Path(__file__).parents[1]
NEWEST = Path(sys.prefix) / "sglang-0.5.23"
PATIENCE = 60.0  # seconds until something counts as hanging
_KINDS = (0, 4, 128)
FIRST_BYTE = 3  # its id in `byte_tokenizer_json`
POOLS = PoolSizes(tokens=16384, slots=32, context=1024, burst=256, page=16)

# -- models ------------------------------------------------------------------------------------------------


@cache
def babbling_model() -> Model:
    """A layer of each kind with random weights: lively output, much of it not UTF-8."""
    return small_model(*_KINDS)


def reciting_model(*lines: str | bytes | list[int]) -> Model:
    """After a token of a line comes the line's next one. No token may have two successors. A line is a text,
    bytes that need not be UTF-8 and are one token each, or tokens."""
    successors: dict[int, int] = {}
    for line in lines:
        tokens = byte_tokenizer().encode(line) if isinstance(line, str) else list(line)
        if isinstance(line, bytes):
            tokens = [FIRST_BYTE + byte for byte in line]
        for token, successor in pairwise(tokens):
            assert successors.setdefault(token, successor) == successor, f"{line!r} is ambiguous"
    config = small_config(*_KINDS)
    weights = dummy_weights(config, seed=1)
    embed, head = weights["embed.weight"], weights["head.weight"]
    embed *= 100  # so that the residual stream is the embedding, whatever the layers add
    for successor in set(successors.values()):
        before = [embed[t] / embed[t].norm() for t, s in successors.items() if s == successor]
        head[successor] = 8 * torch.stack(before).sum(0)
    return Model(config, weights)


def open_engine(model: Model, pools: PoolSizes = POOLS) -> Engine:
    return Engine(model, byte_tokenizer(), EngineConfig(pools=pools, limits=CoreLimits(chunk=pools.burst)))


@cache
def shared_engine() -> Engine:
    """One babbling engine per process, for tests that leave nothing in it."""
    return open_engine(babbling_model())


# -- running -----------------------------------------------------------------------------------------------


def guarded(work: Callable[[], T], patience: float = PATIENCE) -> T:
    """What `work` returns or raises; AssertionError if it hangs.

    It runs in a daemon thread, which its own threads inherit: those of sglang would keep Python from exiting.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(patience)
    assert not thread.is_alive(), f"hangs, no result after {patience} s"
    if errors:
        raise errors[0]
    return results[0]


def same(actual: object, expected: object) -> None:
    """An assert that shows both; pytest does not rewrite those of probe files."""
    assert actual == expected, f"\n     got {actual!r}\nexpected {expected!r}"


class Rig:
    """A backend of its own over an engine, and the engine and model to check it against."""

    def __init__(self, engine: Engine, model: Model, **options: Any) -> None:
        self.engine = engine
        self.model = model
        self.backend = DeepSeekV4Backend(engine, **options)
        self.errors_taken = 0

    def run(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        """`program.run`, finished."""
        state = program.run(*args, backend=self.backend, **kwargs)
        state.sync()
        return state

    def error(self, state: Any) -> Exception:
        """The error of a state that must have one; sglang also warns of it.

        sglang's worker lets `error()` return before it has noted the error, so this waits for the worker's end.
        """
        state.error()
        worker = getattr(state.stream_executor, "worker", None)
        if worker is not None:
            worker.join(60)
        error = state.error()
        assert error is not None, "no error"
        self.errors_taken += 1
        return error

    def prompt(self, text: str) -> list[int]:
        return [self.engine.tokenizer.bos, *self.engine.tokenizer.encode(text)]

    def complete(self, prompt: str | list[int], **params: Any) -> Output:
        """What the engine itself generates; text gets a BOS. Greedy unless told otherwise."""
        tokens = self.prompt(prompt) if isinstance(prompt, str) else prompt
        sampling = SamplingParams(**{"temperature": 0.0, **params})
        return asyncio.run(self.engine.generate(tokens, sampling))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[S, V] by one forward pass without engine, undefined ids blocked."""
        logits = run(self.model, tokens).clone()
        logits[:, self.engine.tokenizer.size :] = -torch.inf
        return logits

    def logprobs(self, before: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Of each of `tokens` given all before it."""
        table = torch.log_softmax(run(self.model, [*before, *tokens]), -1)
        return [float(table[len(before) + i - 1, token]) for i, token in enumerate(tokens)]


@contextmanager
def reciting(*lines: str | bytes | list[int], **options: Any) -> Iterator[Rig]:
    """A rig whose model says the lines."""
    model = reciting_model(*lines)
    with open_engine(model) as engine, rig(engine, model, **options) as made:
        yield made


@contextmanager
def rig(engine: Engine | None = None, model: Model | None = None, **options: Any) -> Iterator[Rig]:
    """A rig that fails at the end if sglang warned of an error nobody asked for, or the engine is not empty."""
    made = Rig(engine or shared_engine(), model or babbling_model(), **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made.backend.flush_cache()  # what tests before this one have left in a shared engine
        try:
            yield made
        finally:
            guarded(made.backend.shutdown)
    assert len(seen) == made.errors_taken, "\n".join(str(w.message) for w in seen)
    wait_for(lambda: is_empty(made.engine), seconds=10)
    core_of(made.engine).pools.check()


# -- probes ------------------------------------------------------------------------------------------------


@cache
def probes() -> dict[str, Callable[[Rig], None]]:
    """By name, without `probe_`."""
    found: dict[str, Callable[[Rig], None]] = {}
    for path in sorted((TESTS / "backend").glob("probes_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        for name, value in vars(module).items():
            if name.startswith("probe_"):
                assert name not in found
                found[name.removeprefix("probe_")] = value
    return found


def run_probe(name: str) -> None:
    random.seed(name)
    with rig() as made:
        guarded(lambda: probes()[name](made))


# Run before anything imports sglang. Its __init__ patches transformers unless these two are there already.
_BOOT = """
import sys, types
sys.path[:0] = [{newest!r}, {tests!r}]
for name in ("sglang.srt.utils", "sglang.srt.utils.hf_transformers_patches"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].apply_all = lambda: None
from support.programs import report_probes
report_probes()
"""


def report_probes() -> None:
    """Run every probe and print a JSON line for each, the first with the version."""
    import sglang

    torch.set_num_threads(1)
    print(json.dumps({"version": sglang.__version__, "path": sglang.__file__}), flush=True)
    for name in probes():
        error = None
        try:
            run_probe(name)
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({"probe": name, "error": error}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # whatever hangs stays behind


def run_newest() -> dict[str, Any]:
    """Every probe under the newest sglang: its version and path, and the error, if any, by probe."""
    boot = _BOOT.format(newest=str(NEWEST), tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", boot], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return {**lines[0], "errors": {line["probe"]: line["error"] for line in lines[1:]}, "stderr": done.stderr}
