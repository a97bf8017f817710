"""No part of a prefill grows with the square of its length."""

import json
import subprocess
import sys

import pytest

from support.tree import ROOT

GIB = 2.0**30


def prefill(length: int, chunk: int) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "benchmarks" / "long_prefill.py"), str(length), str(chunk)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(run.stdout)
    return figures


def test_8k_tokens_in_one_chunk_take_little() -> None:
    assert prefill(8192, 8192)["peak_rss_gib"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [512, 32768])
def test_32k_tokens_stay_under_4_gib(chunk: int) -> None:
    assert prefill(32768, chunk)["peak_rss_gib"] < 4
