"""The wheel ships the five folders as they are in git, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

from support.tree import FOLDERS, ROOT, repo_files


def test_wheel_from_sdist_holds_exactly_the_five_folders(tmp_path: Path) -> None:
    """Building through the sdist proves both; READMEs and data files count like code."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {f"weft/{path}" for path in repo_files() if path.parts[0] in FOLDERS}
    assert {f"weft/{folder}/py.typed" for folder in FOLDERS} <= shipped
    assert any(name.endswith("/licenses/LICENSE") for name in names)
