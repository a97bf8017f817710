"""What is in this repository, for the tests that read its files instead of running them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The folders that ship as `weft.<folder>`, lowest first: each may import itself and those before.
FOLDERS = ("kernels", "runtime", "backend", "gateway", "programs")


def repo_files() -> list[Path]:
    """Files git tracks, or would with `git add .`, relative to the root.

    In a fresh clone these are the tracked files; while a change is being written they include
    its new files, so that a test judges the tree as it is going to be committed.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {Path(name) for name in listing.split("\0") if name}
    return sorted(name for name in names if (ROOT / name).is_file())


def weft_sources() -> dict[str, str]:
    """Source text by import name, for every module in the five folders."""
    return {
        module_name(path): (ROOT / path).read_text()
        for path in repo_files()
        if path.parts[0] in FOLDERS and path.suffix == ".py"
    }


def module_name(path: Path) -> str:
    """Import name of a file in one of the five folders."""
    parts = path.with_suffix("").parts
    return ".".join(("weft", *(parts[:-1] if parts[-1] == "__init__" else parts)))
