"""The `weft` command in this process, on a checkpoint small enough to load for every test."""

from __future__ import annotations

import atexit
import io
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from support.engine import small_config
from weft.gateway.cli.main import main
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.text.tokenizer import byte_tokenizer_json


@cache
def checkpoint() -> str:
    """Random weights, removed when the process ends."""
    folder = mkdtemp(prefix="weft-test-")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "model"
    write_dummy_checkpoint(path, small_config(4, 128), seed=1, tokenizer_json=byte_tokenizer_json())
    return str(path)


class Cli:
    """Runs commands; `out` and `err` are what the last one printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments: Any, stdin: str = "") -> int:
        self._monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        try:
            return main([str(argument) for argument in arguments])
        finally:
            self.out, self.err = self._capsys.readouterr()

    def fails(self, *arguments: Any, stdin: str = "") -> str:
        """The one line that an error leaves, the last, behind what was printed while the model was loaded."""
        assert self(*arguments, stdin=stdin) == 2
        *before, line = self.err.splitlines()
        notices = ("  model-", "KV memory ")
        assert line.startswith("weft: ") and all(notice.startswith(notices) for notice in before), self.err
        return line.removeprefix("weft: ")
