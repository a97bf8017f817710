"""Writing: the layout on disk, equal bytes for equal weights, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from weft.runtime.checkpoint.dummy import DummyWeights, write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME, read_headers
from weft.runtime.checkpoint.layout import tensor_specs
from weft.runtime.checkpoint.reader import load_weights
from weft.runtime.checkpoint.writer import write_official
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("variant", ["fp4", "fp8", "plain"])
def test_files_follow_the_layout(tmp_path: Path, config: ModelConfig, variant: str) -> None:
    if variant == "plain":
        config = dataclasses.replace(config, quantization_config=None)
    else:
        config = dataclasses.replace(config, expert_dtype=variant)
    write_dummy_checkpoint(tmp_path / "m", config, 1, max_shard_bytes=200_000)
    found = {stored.spec.name: stored.spec for stored in read_headers(tmp_path / "m").tensors}
    assert found == {spec.name: spec for spec in tensor_specs(config)}
    assert ModelConfig.load(tmp_path / "m") == config


def test_index_and_shards(tmp_path: Path, config: ModelConfig) -> None:
    write_dummy_checkpoint(tmp_path / "m", config, 1, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "m" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in tensor_specs(config))
    headers = read_headers(tmp_path / "m")
    assert index["weight_map"] == {stored.spec.name: stored.file for stored in headers.tensors}
    count = len(headers.files)
    assert headers.files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for file in headers.files:
        size = sum(stored.spec.nbytes for stored in headers.tensors if stored.file == file)
        assert 0 < size <= 200_000
        with safe_open(tmp_path / "m" / file, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}


def test_a_shard_holds_at_least_one_weight(tmp_path: Path, config: ModelConfig) -> None:
    write_dummy_checkpoint(tmp_path / "a", config, 1, max_shard_bytes=1)
    write_dummy_checkpoint(tmp_path / "b", config, 1)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1
    many, one = (load_weights(tmp_path / name, torch.float32) for name in "ab")
    assert all(torch.equal(many[name], one[name]) for name in one)


def test_equal_weights_give_equal_bytes(tmp_path: Path, config: ModelConfig) -> None:
    for name in ("a", "b"):
        write_dummy_checkpoint(tmp_path / name, config, 7, max_shard_bytes=300_000)
    reverse = dict(reversed(list(DummyWeights(config, 7).items())))
    write_official(tmp_path / "c", config, reverse, max_shard_bytes=300_000)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def test_writing_what_was_read_changes_nothing(tmp_path: Path, config: ModelConfig) -> None:
    """Values of the formats are fixed points; only scales may be chosen smaller."""
    write_dummy_checkpoint(tmp_path / "a", config, 7)
    once = load_weights(tmp_path / "a", torch.bfloat16)
    write_official(tmp_path / "b", config, once)
    again = load_weights(tmp_path / "b", torch.bfloat16)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_tokenizer_and_file_modes(tmp_path: Path, config: ModelConfig) -> None:
    (tmp_path / "m").mkdir()  # an empty folder may exist
    write_dummy_checkpoint(tmp_path / "m", config, 1, tokenizer_json='{"é": 1}')
    assert (tmp_path / "m/tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()}
    assert len(modes) == 1
    write_dummy_checkpoint(tmp_path / "deep/er/m", config, 1)
    assert not (tmp_path / "deep/er/m/tokenizer.json").exists()


def test_existing_files_are_kept(tmp_path: Path, config: ModelConfig) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/precious").write_text("x")
    for path in (tmp_path / "m", tmp_path / "m/precious"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            write_dummy_checkpoint(path, config, 1)
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "precious"]


@pytest.mark.parametrize("name", ["norm.weight", "layers.2.ffn.experts.1.w2.weight"])
def test_nothing_is_left_of_a_failure(tmp_path: Path, config: ModelConfig, name: str) -> None:
    broken = dict(DummyWeights(config, 1))
    broken[name] = broken[name].clone()
    broken[name].view(-1)[3] = torch.nan
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        write_official(tmp_path / "m", config, broken, max_shard_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_unwritable(tmp_path: Path, config: ModelConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_dummy_checkpoint(tmp_path / "file/m", config, 1)


def test_weights_must_fit_the_config(tmp_path: Path, config: ModelConfig) -> None:
    made = dict(DummyWeights(config, 1))
    with pytest.raises(AssertionError, match="do not fit"):
        write_official(tmp_path / "m", config, made | {"more": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"norm\.weight"):
        write_official(tmp_path / "m", config, made | {"norm.weight": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
