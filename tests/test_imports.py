"""Imports point one way, make no cycle, and the light modules stay light."""

import subprocess
import sys

import pytest

from support.imports import find_cycle, import_graph, violations
from support.tree import FOLDERS, ROOT, repo_files, weft_sources

UPWARD_OR_MISNAMED = {
    "upward": "import weft.gateway.app",
    "upward from": "from weft.gateway import app",
    "upward from the root": "from weft import backend",
    "upward in a function": "def f():\n    from weft.programs.chat import chat",
    "upward for types": "if TYPE_CHECKING:\n    from weft.backend.base import Backend",
    "upward by name": "importlib.import_module('weft.gateway.app')",
    "no such folder": "import weft.utils",
    "bare folder": "import kernels",
    "bare from": "from runtime.config import ModelConfig",
    "relative": "from . import config",
    "relative parent": "from ..kernels import linear",
}


@pytest.mark.parametrize("source", UPWARD_OR_MISNAMED.values(), ids=UPWARD_OR_MISNAMED)
def test_a_planted_violation_is_found(source: str) -> None:
    assert len(violations("weft.runtime.engine", source)) == 1


def test_downward_and_outside_imports_are_fine() -> None:
    source = "import torch\nimport weft.kernels.linear\nfrom weft.runtime.config import ModelConfig"
    assert violations("weft.runtime.engine", source) == []
    assert violations("weft.programs.chat", "from weft.gateway import app, cli") == []


def test_imports_point_one_way() -> None:
    sources = weft_sources()
    assert sources
    assert [line for name, text in sources.items() for line in violations(name, text)] == []


def test_a_planted_cycle_is_found() -> None:
    package = "from weft.runtime.cache.pool import Pool"
    cyclic = {
        "weft.runtime.cache": package,
        "weft.runtime.cache.pool": "import weft.runtime.engine",
        "weft.runtime.engine": "from weft.runtime.cache import Pool",
    }
    assert find_cycle(import_graph(cyclic))
    late = {**cyclic, "weft.runtime.engine": "def f():\n    from weft.runtime.cache import Pool"}
    assert find_cycle(import_graph(late)) is None
    sibling = {**late, "weft.runtime.cache.pool": "from weft.runtime.cache.base import Cache"}
    assert find_cycle(import_graph({**sibling, "weft.runtime.cache.base": ""})) is None


def test_no_import_cycle() -> None:
    assert find_cycle(import_graph(weft_sources())) is None


def test_no_top_level_folder_is_a_regular_package() -> None:
    """With an __init__.py, `kernels/` hides the library of that name wherever the root is on
    sys.path, and transformers imports that library.
    """
    assert [name for name in FOLDERS if (ROOT / name / "__init__.py").exists()] == []


@pytest.mark.parametrize("module", ["weft.gateway", "weft.runtime.config", "weft.gateway.cli"])
def test_import_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_no_file_names_the_place_where_it_was_written() -> None:
    """Paths of one machine and package hosts mean nothing to who clones this."""
    words = ("../" + "shared", "/" + "work/", "py" + "pi.org", "python" + "hosted.org")
    found = [
        f"{path}: {word}" for path in repo_files() for word in words if word.encode() in (ROOT / path).read_bytes()
    ]
    assert found == []
