"""`weft run`: one sglang program on one checkpoint."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from weft.backend.language import DeepSeekV4Backend
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError, WeftError


def run(args: argparse.Namespace) -> int:
    program = load_program(args.program)
    arguments = dict(_argument(text) for text in args.arguments)
    config = EngineConfig(dtype=args.dtype, quant_sim=args.quant_sim)
    with Engine.load(Path(args.model), config, show_progress) as engine:
        backend = DeepSeekV4Backend(engine, thinking=args.thinking)
        state = program.run(**arguments, backend=backend)
        text, error = state.text(), state.error()
        backend.shutdown()
    if error is not None:
        # sglang's worker thread keeps the exception; to its caller it would look like success.
        raise error if isinstance(error, WeftError) else WeftError(f"{args.program}: {error!r}") from error
    print(text)
    return 0


def load_program(spec: str) -> Any:
    """The @sgl.function that `module:name` names."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise RequestError("program", spec, "must be module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RequestError("program", spec, str(error)) from error
    program = getattr(module, attribute, None)
    if not callable(getattr(program, "run", None)):
        raise RequestError("program", spec, f"{attribute} is not an @sgl.function of {module_name}")
    return program


def show_progress(done: int, total: int, shard: str) -> None:
    print(f"  {shard}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB", file=sys.stderr)


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RequestError("arguments", text, "must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
