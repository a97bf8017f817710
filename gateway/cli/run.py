"""`weft run`: one sglang program on one checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from weft.backend.executor import Piece, ProgramExecutor, Run
from weft.gateway.cli.generate import load_engine, show
from weft.runtime.errors import RequestError, WeftError


def run(args: argparse.Namespace) -> int:
    program = load_program(args.program)
    arguments = dict(_argument(text) for text in args.arguments)
    with load_engine(args) as engine, ProgramExecutor(engine, thinking=args.thinking) as executor:
        board = Board(show if args.stream else lambda text: None)
        try:
            ended = asyncio.run(_ended(executor, program, arguments, board))
        except WeftError:
            raise
        except Exception as error:  # the program's own
            raise WeftError(f"{args.program}: {error!r}") from error
        if not args.stream:
            show(ended.text() + "\n")
    return 0


async def _ended(executor: ProgramExecutor, program: Any, arguments: dict[str, Any], board: Board) -> Run:
    async for item in executor.stream(program, **arguments):
        if isinstance(item, Run):
            return item
        board.add(item)
    raise AssertionError("a stream ends with the run, or an exception")


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


def _argument(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RequestError("arguments", text, "must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


class Board:
    """Prints variables that are made at the same time one after the other, each as it comes once it is its turn:
    that in which they began."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: dict[str, tuple[str, bool]] = {}  # what of each is not printed yet, and whether it has ended

    def add(self, piece: Piece) -> None:
        place = "".join(f"[{number}]" for number in piece.path.split("/")[1:])
        choice = f" {piece.index}" if piece.index else ""
        name = f"{piece.variable or '(unnamed)'}{place}{choice}"
        text, _ = self._lines.get(name, (f"{name}: ", False))
        ended = piece.meta is None or piece.meta.get("finish_reason", "stop") is not None
        self._lines[name] = text + piece.text, ended
        while self._lines:
            first, (text, ended) = next(iter(self._lines.items()))
            self._write(text + "\n" * ended)
            self._lines[first] = "", ended
            if not ended:
                return
            del self._lines[first]
