"""The `weft` command: what it prints, and that every error is one line and status 2."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from support.tree import ROOT
from weft.gateway.cli import main
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.config import ModelConfig, preset
from weft.runtime.errors import CheckpointError, ConfigError, RequestError, WeftError

PROGRAM = """
import sglang as sgl

@sgl.function
def shout(s, word, times=1, tail=None):
    s += word * times + "!" + str(tail)
    s += sgl.gen("out", max_tokens=4, temperature=0, ignore_eos=True)

@sgl.function
def fails(s):
    s += "before"
    raise ValueError("no such luck")

@sgl.function
def asks_too_much(s):
    s += "x" + sgl.gen("out", max_tokens=10**8)

plain = len
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weft") / "tiny"
    assert main(["checkpoint", "tiny", str(path), "--seed", "3"]) == 0
    return str(path)


def test_the_demo_answers_on_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(1)  # the seeds of what the demo draws, in whatever order it draws
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    for answer in ("-> answer: 428", "-> answer: Lumlus", "'seat': '556'"):
        assert answer in said


def test_the_embedded_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "<｜User｜>The city of Vommas is Lumlus.\nWhat is the city of Vommas?<｜Assistant｜></think>"
    assert main(["generate", prompt, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Lumlus\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a program of a name that no other test imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{tmp_path.name}.py").write_text(PROGRAM)
    return tmp_path


# -- info and checkpoint -------------------------------------------------------------------------------


def test_info_prints_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "pro"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {label.strip(): value.strip() for label, value in rows.items()}
    assert rows["parameters"] == "1,573.00 B (48.85 B active per token)"
    assert rows["layers"] == "61: 30 c4a, 31 c128a"
    assert rows["checkpoint tensors"] == "145,116"
    assert rows["checkpoint bytes"] == "805.32 GiB"
    assert rows["KV cache, bf16"] == "9.62 GiB for 1,048,576 tokens"
    assert "ignored keys" not in rows


def test_info_of_a_folder_names_the_keys_it_ignores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = preset("tiny").to_dict() | {"brand_new": 1, "another": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "another, brand_new" in out
    assert main(["info", "tiny"]) == 0
    assert capsys.readouterr().out == "".join(line for line in out.splitlines(True) if "ignored" not in line)


def test_checkpoint_can_be_read_again(checkpoint: str) -> None:
    assert Checkpoint.open(checkpoint).config == preset("tiny")
    assert (Path(checkpoint) / "tokenizer.json").exists()


def test_checkpoint_takes_the_shape_of_a_folder(checkpoint: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert main(["checkpoint", checkpoint, str(copy), "--seed", "3"]) == 0
    for file in Path(checkpoint).iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    other = tmp_path / "other"
    assert main(["checkpoint", checkpoint, str(other), "--seed", "4"]) == 0
    assert ModelConfig.load(other) == ModelConfig.load(copy)
    assert [(copy / f.name).read_bytes() == f.read_bytes() for f in other.glob("*.safetensors")] == [False]


# -- run -----------------------------------------------------------------------------------------------


def test_run_prints_the_text_of_a_program(
    checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments are JSON where they parse, else text."""
    program = f"{folder.name}:shout"
    outputs = []
    for arguments in (["word=hé", "times=3"], ['word="hé"', "times=3", "tail=null"], ["word=5", "times=1"]):
        assert main(["run", program, *arguments, "--model", checkpoint]) == (2 if "word=5" in arguments else 0)
        outputs.append(capsys.readouterr())
    assert outputs[0].out.startswith("héhéhé!None")
    assert outputs[0].out == outputs[1].out
    assert "MiB" in outputs[0].err  # progress of loading
    assert "weft: " in outputs[2].err  # 5 is a number, and 5 * 1 + "!" no text


def test_run_passes_its_options_on(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", f"{folder.name}:shout", "word=x", "--model", checkpoint]
    assert main([*arguments, "--dtype", "bfloat16", "--quant-sim", "--thinking"]) == 0
    assert capsys.readouterr().out.startswith("x!None")


def test_run_takes_arguments_behind_its_options(
    checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", f"{folder.name}:shout", "--model", checkpoint, "word=x"]) == 0
    assert capsys.readouterr().out.startswith("x!None")


ERRORS = [
    (["info", "huge"], "known presets"),
    (["info", "."], "file not found"),
    (["checkpoint", "huge", "x"], "known presets"),
    (["checkpoint", "tiny", "{model}"], "exists and is not an empty folder"),
    (["run", "nowhere:f", "--model", "{model}"], "No module named 'nowhere'"),
    (["run", "{module}", "--model", "{model}"], "must be module:function"),
    (["run", ":f", "--model", "{model}"], "must be module:function"),
    (["run", "{module}:absent", "--model", "{model}"], "is not an @sgl.function"),
    (["run", "{module}:plain", "--model", "{model}"], "is not an @sgl.function"),
    (["run", "{module}:shout", "word", "--model", "{model}"], "must be key=value"),
    (["run", "{module}:shout", "=word", "--model", "{model}"], "must be key=value"),
    (["run", "{module}:shout", "--model", "{model}"], "word"),
    (["run", "{module}:shout", "word=x", "colour=red", "--model", "{model}"], "colour"),
    (["run", "{module}:shout", "word=x", "backend=1", "--model", "{model}"], "backend"),
    (["run", "{module}:fails", "--model", "{model}"], "no such luck"),
    (["run", "{module}:asks_too_much", "--model", "{model}"], "context"),
    (["run", "{module}:shout", "word=x", "--model", "absent"], "absent"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(model=checkpoint, module=folder.name) for argument in arguments]
    assert main(filled) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "MiB" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("weft: ")
    assert message in lines[0]
    assert out == ""
    with pytest.raises(WeftError, match=r".*" + message.split()[-1]):
        main(["--debug", *filled])


def test_a_program_that_cannot_be_imported_is_named(
    checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("broken_syntax", "def f(:"), ("broken_name", "from json import no_such_name")):
        (folder / f"{name}.py").write_text(text)
        assert main(["run", f"{name}:f", "--model", checkpoint]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name.removeprefix("broken_") in line


def test_debug_raises_the_error_itself() -> None:
    with pytest.raises(ConfigError):
        main(["--debug", "info", "huge"])
    with pytest.raises(RequestError):
        main(["--debug", "run", "x", "--model", "."])
    with pytest.raises(CheckpointError):
        main(["--debug", "checkpoint", "tiny", str(ROOT)])


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.gateway.cli.info.run", interrupt)
    assert main(["info", "tiny"]) == 130


@pytest.mark.parametrize("arguments", [[], ["info"], ["run"], ["unheard-of"], ["info", "tiny", "pro"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: weft" in capsys.readouterr().err


# -- what is imported ----------------------------------------------------------------------------------

_HEAVY = ("torch", "sglang", "numpy", "tokenizers", "safetensors", "rich")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["info", "pro"]])
def test_help_and_info_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from weft.gateway.cli import main
try:
    status = main({arguments!r})
except SystemExit as stop:
    status = stop.code
loaded = [name for name in {_HEAVY!r} if name in sys.modules]
assert not loaded, loaded
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_module_runs_as_a_program() -> None:
    code = "import sys; from weft.gateway.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "info", "tiny"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters" in done.stdout
