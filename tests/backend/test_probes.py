"""Every form of program that sglang's interpreter knows, in the installed sglang and in the newest one."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.programs import NEWEST, probes, run_newest, run_probe

NAMES = sorted(probes())


@pytest.mark.parametrize("name", NAMES)
def test_installed(name: str) -> None:
    run_probe(name)


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `run_newest` found, once for all workers of a test run."""
    if not NEWEST.is_dir():
        reason = f"no light install in {NEWEST}; `make test` makes one"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return _once(folder / "newest-sglang.json")


def _once(path: Path) -> dict[str, Any]:
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(run_newest()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_newest_is_another_version(newest: dict[str, Any]) -> None:
    assert newest["path"].startswith(str(NEWEST))
    assert f"sglang-{newest['version']}" == NEWEST.name
    assert sorted(newest["errors"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_newest(name: str, newest: dict[str, Any]) -> None:
    assert name in newest["errors"], newest["stderr"]
    assert newest["errors"][name] is None, newest["errors"][name]
