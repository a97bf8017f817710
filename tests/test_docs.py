"""The link checker finds what it is there for."""

import subprocess
import sys
from pathlib import Path

from support.tree import ROOT

PAGE = """# One two: `three`
[file](b.md) [heading](#one-two-three) [both](b.md#b) [host](https://example.com/none)
`[code](none.md)`
```
[fenced](none.md)
```
"""


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docs" / "check_links.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True)


def test_good_links_pass(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(PAGE)
    (tmp_path / "b.md").write_text("# B\n")
    run = check(tmp_path)
    assert run.returncode == 0, run.stdout


def test_planted_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(PAGE + "[gone](c.md) [gone](#four)\n[ref]: b.md#none\n")
    (tmp_path / "b.md").write_text("# B\n")
    run = check(tmp_path)
    assert run.returncode == 1
    assert run.stdout.count("a.md:") == 3


def test_links_of_this_repository() -> None:
    run = check(ROOT)
    assert run.returncode == 0, run.stdout
