"""A model of 0.5 M parameters with every kind of layer and tensor."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.config import ModelConfig, preset


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """FP4 experts. No FP8 matrix is cut by a block edge: transformers cannot load those."""
    return dataclasses.replace(
        preset("tiny"),
        vocab_size=64,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        num_hash_layers=1,
        q_lora_rank=128,
        o_lora_rank=64,
        n_routed_experts=4,
        moe_intermediate_size=128,
    )


@pytest.fixture(scope="session")
def plain(config: ModelConfig) -> ModelConfig:
    """The same model, not quantised."""
    return dataclasses.replace(config, quantization_config=None)


@pytest.fixture(scope="session")
def refresh(config: ModelConfig) -> ModelConfig:
    """The same model with three DSpark draft stages instead of the MTP block."""
    return dataclasses.replace(
        config,
        compress_ratios=(0, 4, 128, 0, 0, 0),
        dspark_block_size=5,
        dspark_noise_token_id=63,
        dspark_target_layer_ids=(0, 1, 2),
        dspark_markov_rank=8,
    )


@pytest.fixture
def folder(tmp_path: Path, config: ModelConfig) -> Path:
    """A checkpoint of `config` in several shards, which the test may damage."""
    write_dummy_checkpoint(tmp_path / "model", config, seed=1, max_shard_bytes=300_000)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def scatter() -> Callable[..., None]:
    return _scatter


def _scatter(folder: Path, seed: int, prefix: str = "") -> None:
    """Store the same tensors as no writer of ours would, but as the format allows.

    They are dealt to three files at random, scales apart from their matrices, in random order, with
    odd header texts; and index and config are formatted by hand.
    """
    draw = random.Random(seed)
    tensors: list[tuple[str, dict, bytes]] = []
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]
        for name, entry in header.items():
            begin, end = entry.pop("data_offsets")
            tensors.append((prefix + name, entry, data[8 + length + begin : 8 + length + end]))
        path.unlink()
    draw.shuffle(tensors)
    files = ["b.safetensors", "model-one.safetensors", "é.safetensors"]
    weight_map = {}
    for file in files:
        mine = [tensors.pop() for _ in range(len(tensors) if file == files[-1] else len(tensors) // 2)]
        _write(folder / file, mine, draw)
        weight_map |= {name: file for name, _, _ in mine}
    index = json.dumps({"weight_map": weight_map, "metadata": {"note": "ä"}}, indent=1, ensure_ascii=False)
    (folder / INDEX_NAME).write_bytes(index.replace("\n", "\r\n").encode())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"novel": "ü"}, indent=7, ensure_ascii=False))


def _write(path: Path, tensors: list[tuple[str, dict, bytes]], draw: random.Random) -> None:
    # The place in the data is aligned by size, the place in the header is free.
    placed, offset = [], 0
    for name, entry, data in sorted(tensors, key=lambda tensor: tensor[1]["dtype"][-2:] not in ("64", "32")):
        placed.append((name, entry | {"data_offsets": [offset, offset + len(data)]}, data))
        offset += len(data)
    header = {name: entry for name, entry, _ in draw.sample(placed, len(placed))}
    text = json.dumps(header | {"__metadata__": {"by": "ö", "format": "pt"}}, ensure_ascii=draw.random() < 0.5)
    raw = text.encode() + b" " * draw.randint(0, 9)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in placed))
    with safe_open(path, framework="np") as shard:
        assert len(shard.keys()) == len(tensors)
