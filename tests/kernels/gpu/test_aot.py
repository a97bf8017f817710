"""Compiling for GPUs that are not there: what is right passes, and each kind of fault is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUBJECT = Path(__file__).parent / "aot_subject.py"


Faults = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def faults() -> Faults:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SUBJECT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Faults = json.loads(done.stdout)
    return found


def test_a_good_kernel_has_none(faults: Faults) -> None:
    assert faults["good"] == {"sm90": [], "sm100": []}


def test_a_missing_instruction_is_found(faults: Faults) -> None:
    assert all("not found" in str(found) for found in faults["another instruction"].values())


def test_spills_are_found(faults: Faults) -> None:
    assert "spills" in str(faults["spills"]["sm90"])


def test_too_much_tensor_memory_is_found(faults: Faults) -> None:
    """Triton itself says nothing: it compiles such a kernel to a bare trap."""
    assert "trap" in str(faults["too many TMEM columns"]["sm100"])
