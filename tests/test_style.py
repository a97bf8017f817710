"""Budgets and habits that ruff has no rule for."""

import ast
import re
from collections.abc import Callable, Collection, Iterator

import pytest

from support.tree import FOLDERS, ROOT, repo_files

MAX_FILE_LINES = 350  # the aim is 300
MAX_FUNCTION_LINES = 60  # the aim is 40
EXEMPT: dict[str, str] = {  # path -> why it may be longer
    "tests/support/reference.py": "one oracle, read from top to bottom",
}

BROAD = {"Exception", "BaseException"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
PROMISE = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")  # split, or this file would hold one

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

Check = Callable[[ast.AST, str], Iterator[str]]


def oversized(tree: ast.AST, text: str) -> Iterator[str]:
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"1: file of {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines"


def swallowed(tree: ast.AST, text: str) -> Iterator[str]:
    """Handlers that catch everything and do nothing, and the same written with suppress."""
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=kind, body=body):
                found = (kind is None or _names(kind) & BROAD) and all(map(_idle, body))
            case ast.Call(func=func, args=args) if "suppress" in _names(func):
                found = any(_names(argument) & BROAD for argument in args)
            case _:
                continue
        if found:
            yield f"{node.lineno}: swallows every error"


def environment_reads(tree: ast.AST, text: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _names(node.value) == {"os"}:
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        else:
            continue
        if names & ENVIRONMENT:
            yield f"{node.lineno}: reads the environment"


def promises(tree: ast.AST, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if PROMISE.search(line):
            yield f"{number}: promises later work, which belongs in an issue"


def _idle(step: ast.stmt) -> bool:
    """pass, continue, `...` or a string."""
    bare = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
    return bare or isinstance(step, ast.Pass | ast.Continue)


def _names(node: ast.expr) -> set[str]:
    """Last names of an expression or of a tuple of them: {"A", "C"} for (A, b.C)."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return {ast.unparse(part).rpartition(".")[2] for part in parts}


def _found(check: Check, skip: Collection[str] = (), inside: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in repo_files():
        if path.suffix != ".py" or str(path) in skip or (inside and path.parts[0] not in inside):
            continue
        text = (ROOT / path).read_text()
        found += [f"{path}:{line}" for line in check(ast.parse(text), text)]
    return found


def test_sizes() -> None:
    assert [path for path in EXEMPT if not (ROOT / path).exists()] == []
    assert _found(oversized, skip=EXEMPT) == []


def test_no_swallowed_errors() -> None:
    assert _found(swallowed) == []


def test_no_promises() -> None:
    assert _found(promises) == []


def test_environment_is_read_in_one_place() -> None:
    assert _found(environment_reads, skip={"runtime/env.py"}, inside=FOLDERS) == []


PLANTED = [
    (oversized, "x = 1\n" * 351),
    (oversized, "async def f():\n" + "    x = 1\n" * 60),
    (swallowed, "try:\n    f()\nexcept:\n    pass"),
    (swallowed, "try:\n    f()\nexcept (OSError, Exception):\n    ..."),
    (swallowed, "with contextlib.suppress(Exception):\n    f()"),
    (environment_reads, "import os\nos.environ.get('A')"),
    (environment_reads, "from os import getenv"),
    (promises, "x = 1  # TO" + "DO: better"),
]


@pytest.mark.parametrize(("check", "text"), PLANTED)
def test_a_planted_fault_is_found(check: Check, text: str) -> None:
    assert len(list(check(ast.parse(text), text))) == 1


def test_a_narrow_or_handled_error_is_fine() -> None:
    text = "try:\n    f()\nexcept KeyError:\n    pass\nexcept Exception as error:\n    log(error)"
    assert list(swallowed(ast.parse(text), text)) == []
