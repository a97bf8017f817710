"""A model of 0.5 M parameters with every kind of layer and tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
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


@pytest.fixture
def folder(tmp_path: Path, config: ModelConfig) -> Path:
    """A checkpoint of `config` in several shards, which the test may damage."""
    write_dummy_checkpoint(tmp_path / "model", config, seed=1, max_shard_bytes=300_000)
    return tmp_path / "model"
