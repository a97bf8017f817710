"""`weft run`: one sglang program on one checkpoint."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from sglang.lang.interpreter import ProgramState, StreamExecutor, run_internal
from sglang.lang.ir import SglSamplingParams

from weft.backend.convert import count_of
from weft.backend.language import DeepSeekV4Backend
from weft.gateway.cli.generate import load_engine, show
from weft.runtime.errors import RequestError, WeftError


def run(args: argparse.Namespace) -> int:
    program = load_program(args.program)
    sampling, arguments = _split(program, dict(_argument(text) for text in args.arguments))
    engine = load_engine(args)
    backend = (_StreamingBackend if args.stream else DeepSeekV4Backend)(engine, thinking=args.thinking)
    options = {"chat_template": None, "stream": False, "num_api_spec_tokens": program.num_api_spec_tokens}
    executor = Executor(backend, arguments, sampling, **options)
    executor.board = Board(show if args.stream else lambda text: None)
    try:
        with engine:
            _interpret(program, arguments, executor)
    finally:
        # If the program has left early, its gens end with the engine, and their workers with them. Only then can
        # the loop stop on which they wait.
        for state in executor.family:
            state.end()
            state.worker.join()
        backend.shutdown()
    if executor.errors:
        first = executor.errors[0]  # the later ones follow from it
        raise first if isinstance(first, WeftError) else WeftError(f"{args.program}: {first!r}") from first
    if not args.stream:
        show(executor.text_ + "\n")
    return 0


def _interpret(program: Any, arguments: dict[str, Any], executor: Executor) -> None:
    """Run the program to its end; what it raises joins its states' errors."""
    try:
        run_internal(ProgramState(executor), program, (), arguments, True)
    except Exception as error:
        executor.errors.append(error)


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


def _split(program: Any, given: dict[str, Any]) -> tuple[SglSamplingParams, dict[str, Any]]:
    """The given arguments that `program.run` takes for itself, as it does, and those of the program."""
    own = inspect.signature(program.run).parameters
    sampling = {name: value for name, value in given.items() if name in own}
    arguments = {name: value for name, value in given.items() if name not in own} | program.bind_arguments
    for name in {"backend", "stream", "use_thread"} & sampling.keys():
        raise RequestError("arguments", name, "is not for the command line")
    try:
        inspect.signature(program.func).bind(None, **arguments)
    except TypeError as error:
        raise RequestError("arguments", " ".join(given), str(error)) from None
    return SglSamplingParams(**sampling), arguments


class Executor(StreamExecutor):  # type: ignore[misc]  # sglang has no types
    """A state of sglang's that keeps errors and tells a board what its gens and selects write.

    sglang's own state ends its worker at the first error: what is asked of it later hangs, and the error of a
    fork is lost. This one does nothing more, so the program runs to its end or misses a variable, and `errors` has
    the origin first. errors, family: shared by all forks, which are the family. place: which fork it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.board = Board(lambda text: None)
        self.errors: list[Exception] = []
        self.family: list[Executor] = [self]
        self.failed = False
        self.place = ""
        self.line: Line | None = None
        super().__init__(*args, **kwargs)

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> list[Any]:
        children: list[Any] = super().fork(size, position_ids_offset)
        for i, child in enumerate(children):
            # The base class makes its own kind. Its workers have nothing to do yet.
            child.__class__ = Executor
            child.board, child.errors, child.family = self.board, self.errors, self.family
            child.failed, child.place, child.line = self.failed, f"{self.place}[{i}]", None
            self.family.append(child)
        return children

    def _execute(self, other: Any) -> None:
        if not self.failed:
            try:
                super()._execute(other)
                return
            except Exception as error:
                self.failed, self.error_ = True, error
                self.errors.append(error)
        for event in list(self.variable_event.values()):
            event.set()  # whoever waits finds no such variable

    def _execute_gen(self, expr: Any) -> None:
        self.line = self.board.begin(f"{expr.name or '(unnamed)'}{self.place}")
        try:
            super()._execute_gen(expr)
        finally:
            self.line.end()
            self.line = None

    def _execute_select(self, expr: Any) -> None:
        super()._execute_select(expr)
        if expr.name is not None:
            line = self.board.begin(f"{expr.name}{self.place}")
            line.add(self.variables[expr.name])
            line.end()


class _StreamingBackend(DeepSeekV4Backend):
    """sglang's own stream mode loses the program's errors and ignores separate_reasoning, so it is left alone: a
    gen is streamed to its state's line, and returned whole."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str | list[str], Any]:
        line: Line | None = getattr(s, "line", None)
        if line is None:  # of a program that this one runs by itself
            return super().generate(s, sampling_params)
        if count_of(sampling_params) > 1:
            texts, metas = super().generate(s, sampling_params)
            line.add("\n".join(f"{i}: {text}" for i, text in enumerate(texts)))
            return texts, metas
        pieces: list[str] = []
        meta: dict[str, Any] = {}
        for piece, meta in self.generate_stream(s, sampling_params):  # noqa: B007  # the last one is the result's
            line.add(piece)
            pieces.append(piece)
        return "".join(pieces), meta


class Board:
    """Prints lines that are written at the same time one after the other, each as it comes once it is its turn.

    Lines are written by several threads, in the order in which they began.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._lines: list[Line] = []  # the first is being printed

    def begin(self, name: str) -> Line:
        line = Line(self, f"{name}: ")
        with self._lock:
            self._lines.append(line)
            self._advance()
        return line

    def change(self, line: Line, text: str, ended: bool) -> None:
        with self._lock:
            line.text += text
            line.ended = ended
            self._advance()

    def _advance(self) -> None:
        while self._lines:
            line = self._lines[0]
            self._write(line.text)
            line.text = ""
            if not line.ended:
                return
            self._write("\n")
            del self._lines[0]


class Line:
    """One variable on a board. text: not printed yet."""

    def __init__(self, board: Board, text: str) -> None:
        self._board = board
        self.text = text
        self.ended = False

    def add(self, text: str) -> None:
        self._board.change(self, text, False)

    def end(self) -> None:
        self._board.change(self, "", True)
