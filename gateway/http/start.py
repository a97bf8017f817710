"""What a server does before it serves: its engine, in a process of its own, and one token drawn by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weft.gateway.http.state import State
from weft.gateway.runs.runs import Runs
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine


def make_engine(path: Path, config: EngineConfig, progress: Callable[[int, int, str], None]) -> Engine:
    return Engine(path, config=config, process=True, progress=progress)


async def prepare(state: State) -> None:
    """Import the programs, wait for the model, draw a token."""
    state.part(Runs)
    engine = state.engine
    await engine.generate([engine.tokenizer.bos], SamplingParams(max_tokens=1))
