"""`weft run`: a program's text, its variables as they come, and its errors, none of which may hang or be lost."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from support.cli import Cli, checkpoint
from support.programs import guarded
from weft.backend.executor import Piece
from weft.gateway.cli.run import Board

PROGRAMS = """
import sglang as sgl

@sgl.function
def two(s, topic, length=4):
    s += "About " + topic + ": " + sgl.gen("first", max_tokens=length, temperature=0)
    s += " and " + sgl.gen("second", max_tokens=length, temperature=0) + sgl.gen(max_tokens=2, temperature=0)

@sgl.function
def forks(s):
    s += "Once"
    children = s.fork(2)
    children += sgl.gen("part", max_tokens=3, temperature=0)
    children.join()
    with s.copy() as other:
        other += sgl.gen("aside", max_tokens=2, temperature=0)
    s += sgl.select("choice", ["yes", "no"]) + sgl.gen("several", max_tokens=2, n=2, temperature=0)
    s.set_var("seen", s["part"])

@sgl.function
def free(s):
    s += sgl.gen("x", ignore_eos=True)

@sgl.function
def refused(s):
    s += "a" + sgl.gen("good", max_tokens=2) + sgl.gen("bad", max_tokens=2, top_p=3.0)
    s.sync()
    s += "more" + sgl.gen("later", max_tokens=2)
    s["later"]

@sgl.function
def refused_fork(s):
    s += "a"
    children = s.fork(2)
    children += [sgl.gen("x", max_tokens=2, top_p=3.0), sgl.gen("x", max_tokens=2)]
    children.join()

@sgl.function
def raises(s):
    s += "a" + sgl.gen("x", max_tokens=500, ignore_eos=True)
    raise ValueError("of its own")

@sgl.function
def asks(s):
    s += "a" + sgl.gen("x", max_tokens=2, top_p=3.0)
    s.set_var("seen", repr(s.error()))
    assert "top_p" in s["seen"]
"""


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    (tmp_path / "cli_programs.py").write_text(PROGRAMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_programs", raising=False)
    return Cli(capsys, monkeypatch)


def command(program: str, *arguments: str) -> list[str]:
    return ["run", f"cli_programs:{program}", *arguments, "--model", checkpoint()]


def test_variables_as_they_come_add_up_to_the_text(weft: Cli) -> None:
    assert weft(*command("two", "topic=looms", "length=3")) == 0
    text = weft.out
    assert weft(*command("two", "topic=looms", "length=3", "--stream")) == 0
    first, rest = weft.out.removeprefix("first: ").split("\nsecond: ")
    second, unnamed = rest.split("\n(unnamed): ")
    assert text == f"About looms: {first} and {second}{unnamed}"


def test_forks_selects_and_several_at_once(weft: Cli) -> None:
    assert weft(*command("forks", "--stream")) == 0
    names = ["part[0]: ", "part[1]: ", "aside[2]: ", "choice: ", "several: ", "several 1: "]
    assert all(weft.out.count(name) == 1 for name in names)
    first, second = (weft.out.split(f"part[{i}]: ")[1] for i in range(2))
    assert first[:3] == second[:3]  # greedy, so both say the same


def test_arguments_of_run_itself(weft: Cli) -> None:
    """`max_new_tokens` is what an unlimited gen of the program may take, as in sglang's own `program.run`."""
    for stream in ([], ["--stream"]):
        lengths = []
        for limit in (2, 9):
            assert weft(*command("free", "temperature=0", f"max_new_tokens={limit}", *stream)) == 0
            lengths.append(len(weft.out))
        assert lengths[0] < lengths[1]
    assert weft.fails(*command("two")) == "arguments = '': two: missing a required argument: 'topic'"
    assert weft.fails(*command("two", "topic=a", "mood=b")) == "mood = 'b': two has no such argument"
    assert weft.fails(*command("two", "topic")) == "arguments = 'topic': must be key=value"
    assert weft.fails(*command("two", "topic=a", "backend=b")).startswith("backend = 'b'")
    assert weft.fails("run", "nosuch:program", "--model", checkpoint()).startswith("program = 'nosuch:program'")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_errors_reach_the_caller(weft: Cli, stream: list[str]) -> None:
    def failing(program: str) -> str:
        return guarded(lambda: weft.fails(*command(program, *stream)))

    before = set(threading.enumerate())
    for program, origin in (
        ("refused", "variable 'bad'"),
        ("refused_fork", "state /0, variable 'x'"),
        ("asks", "variable 'x'"),
    ):
        assert failing(program) == f"{program}, {origin}: RequestError: top_p = 3.0: must be in (0, 1]"
    assert failing("raises") == "cli_programs:raises: ValueError('of its own')"
    assert set(threading.enumerate()) <= before, "a worker was left behind"


def test_a_board_prints_one_line_at_a_time() -> None:
    printed: list[str] = []
    board = Board(printed.append)

    def shown(name: str, text: str, *, ends: bool = False) -> str:
        """What is printed when this comes."""
        board.add(Piece("", name, text, {"finish_reason": "stop" if ends else None}))
        out = "".join(printed)
        printed.clear()
        return out

    assert shown("a", "") == "a: "
    assert shown("b", "") == shown("c", "3") == shown("b", "2") == ""
    assert shown("a", "1") == "1"
    assert shown("c", "", ends=True) == shown("b", "2") == ""
    assert shown("a", "1", ends=True) == "1\nb: 22"
    assert shown("b", "2") == "2"
    assert shown("b", "", ends=True) == "\nc: 3\n"
    assert shown("b", "again", ends=True) == "b: again\n"
