"""`weft convert`: progress on stderr, the result on stdout."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from weft.gateway.cli import convert
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.config import preset
from weft.runtime.errors import CheckpointError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = dataclasses.replace(
        preset("tiny"), vocab_size=32, num_hidden_layers=2, compress_ratios=(0, 4, 0), n_routed_experts=3
    )
    write_dummy_checkpoint(tmp_path / "m", config, 1, max_shard_bytes=300_000)
    return tmp_path / "m"


def arguments(source: Path, target: Path, to: str, dequantise: bool = False) -> argparse.Namespace:
    return argparse.Namespace(source=str(source), target=str(target), to=to, dequantise=dequantise)


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.run(arguments(source, tmp_path / "hf", "huggingface")) == 0
    told = capsys.readouterr()
    assert told.out == f"wrote {tmp_path / 'hf'}\n"
    lines = told.err.splitlines()
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert [line.split(":")[0].strip() for line in lines] == files and len(files) > 1
    total = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20
    assert lines[-1].endswith(f" {total:.1f} of {total:.1f} MiB")
    assert convert.run(arguments(tmp_path / "hf", tmp_path / "back", "official")) == 0
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()
    }


def test_dequantise(source: Path, tmp_path: Path) -> None:
    assert convert.run(arguments(source, tmp_path / "hf", "huggingface", dequantise=True)) == 0
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (source, tmp_path / "hf")]
    assert sizes[1] > 1.2 * sizes[0]


def test_errors_reach_the_caller(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already"):
        convert.run(arguments(source, tmp_path / "hf", "official"))
