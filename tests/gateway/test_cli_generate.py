"""`weft generate`, and what all commands share: light help, errors of one line, quiet ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cli import Cli, checkpoint
from support.tree import ROOT
from weft.gateway.cli.generate import show
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.text.tokens import BOS

COMMANDS = ("demo", "run", "generate", "chat", "info", "checkpoint", "convert")
HEAVY = "torch sglang numpy msgspec tokenizers deepseek_recipe asyncio rich"


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def generated(prompt: list[int], **params: Any) -> Output:
    """What the engine itself makes of the tokens."""
    with Engine.load(checkpoint()) as engine:
        return asyncio.run(engine.generate(prompt, SamplingParams(**params)))


PROMPT = [0, *(3 + byte for byte in b"Hello")]


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_the_text_is_the_engines(weft: Cli, stream: list[str]) -> None:
    options = ("--max-tokens", 12, "--seed", 5, "--top-p", 0.9, "--temperature", 0.7, *stream)
    assert weft("generate", "Hello", "--model", checkpoint(), *options) == 0
    expected = generated(PROMPT, max_tokens=12, seed=5, top_p=0.9, temperature=0.7)
    assert weft.out == expected.text + "\n"


def test_prompt_from_standard_input_and_with_its_own_bos(weft: Cli) -> None:
    expected = generated(PROMPT, max_tokens=4, temperature=0).text + "\n"
    for prompt, stdin in (("-", "Hello"), (f"{BOS}Hello", "")):
        options = ("--model", checkpoint(), "--max-tokens", 4, "--temperature", 0)
        assert weft("generate", prompt, *options, stdin=stdin) == 0
        assert weft.out == expected


def test_stop_and_nothing_to_generate(weft: Cli) -> None:
    options = ("--model", checkpoint(), "--seed", 5)
    text = generated(PROMPT, max_tokens=30, seed=5).text
    stop = text[9]
    assert weft("generate", "Hello", *options, "--max-tokens", 30, "--stop", "never", "--stop", stop) == 0
    assert weft.out == text[: text.index(stop)] + "\n"
    assert weft("generate", "Hello", *options, "--max-tokens", 0) == 0
    assert weft.out == "\n"


def test_logprobs(weft: Cli) -> None:
    expected = generated(PROMPT, max_tokens=5, seed=5, logprobs=2)
    options = ("--max-tokens", 5, "--seed", 5, "--logprobs", 2)
    assert weft("generate", "Hello", "--model", checkpoint(), *options) == 0
    rows = weft.out[len(expected.text) + 1 :].splitlines()
    assert [row.split()[:2] for row in rows] == [[f"{r.logprob:.4f}", str(r.token)] for r in expected.logprobs]
    for row, result in zip(rows, expected.logprobs, strict=True):
        for token, logprob in result.top:
            assert f"{logprob:.4f} {token:>6} " in row


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_terminal_does_not_obey_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    show("a\x1b[2J\tb\n\r\x07\x9b中")
    assert screen.text == "a␛[2J\tb\n␍␇�中"


# -- errors ------------------------------------------------------------------------------------------------


def test_an_error_is_one_line(weft: Cli, tmp_path: Path) -> None:
    model = ("--model", checkpoint())
    assert weft.fails("generate", "x", *model, "--top-p", 2) == "top_p = 2.0: must be in (0, 1]"
    assert weft.fails("generate", "x", *model, "--stop", "").startswith("stop = ('',)")
    assert weft.fails("generate", "x", *model, "--max-tokens", -1).startswith("max_tokens = -1")
    assert "the context holds" in weft.fails("generate", "x", *model, "--max-tokens", 10**6)
    assert "surrogates" in weft.fails("generate", "a\udcff", *model)
    assert "file not found" in weft.fails("generate", "x", "--model", tmp_path)
    assert weft.fails("info", "nosuch").startswith("preset = 'nosuch'")


def test_a_broken_tokenizer(weft: Cli, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    (model / "tokenizer.json").write_text('{\n"version": 1\n}')
    assert "not a tokenizer" in weft.fails("generate", "x", "--model", model)
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in weft.fails("generate", "x", "--model", model)


def break_info(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def report(config: object) -> None:
        raise error

    monkeypatch.setattr("weft.gateway.cli.info.report", report)


def test_an_error_nobody_foresaw_is_one_line_too(weft: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    break_info(monkeypatch, KeyError("a\nb"))
    assert weft.fails("info", "tiny") == r"KeyError: 'a\nb' (--debug shows where)"
    break_info(monkeypatch, OSError("two\nlines"))
    assert weft.fails("info", "tiny") == "OSError: two lines (--debug shows where)"


@pytest.mark.parametrize("place", ["before", "behind"])
def test_debug_shows_the_traceback(weft: Cli, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    break_info(monkeypatch, KeyError("where"))
    with pytest.raises(KeyError, match="where"):
        weft(*(["--debug", "info", "tiny"] if place == "before" else ["info", "tiny", "--debug"]))


def test_an_interrupt_is_quiet(weft: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    break_info(monkeypatch, KeyboardInterrupt())
    assert weft("info", "tiny") == 130
    assert weft.out == weft.err == ""


# -- in a process of its own -------------------------------------------------------------------------------


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, **{**pipes, **options})


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from weft.gateway.cli import main
for command in {COMMANDS!r}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
loaded = [name for name in {HEAVY!r}.split() if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    run = python(code)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert all(f"weft {command}" in out for command in COMMANDS)


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from weft.gateway.cli import main; sys.exit(main(sys.argv[1:]))"
    run = python(code, "generate", "Hello", "--stream", "--max-tokens", "3000", "--model", checkpoint())
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    with run.stderr:
        err = run.stderr.read()
    assert run.wait() == 141
    assert "Traceback" not in err and "BrokenPipe" not in err
