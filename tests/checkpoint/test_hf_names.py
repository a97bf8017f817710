"""The same weights in every spelling; transformers is the judge of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.runtime.checkpoint.dummy import dummy_weights, write_dummy_checkpoint
from weft.runtime.checkpoint.hf_names import merged_name, official_name, to_hf_state_dict
from weft.runtime.checkpoint.layout import scale_name, weights
from weft.runtime.checkpoint.reader import Checkpoint, load_weights
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own insides


@pytest.fixture(scope="session")
def backbone(plain: ModelConfig) -> dict[str, Tensor]:
    made = dummy_weights(plain, 5)
    return {name: tensor for name, tensor in made.items() if not name.startswith("mtp.")}


def hf_model(config: ModelConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    keys = config.to_dict() | {"torch_dtype": "float32"}
    hf_config = transformers.DeepseekV4Config(**keys)
    return transformers.DeepseekV4ForCausalLM(hf_config)


def save(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "a.safetensors")
    return folder


def check(folder: Path, expected: dict[str, Tensor], layout: str) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layout == layout
    assert checkpoint.config.has_mtp == any(name.startswith("mtp.") for name in expected)
    loaded = dict(checkpoint.load(torch.float32))
    assert loaded.keys() == expected.keys()
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []


# -- what transformers makes of our files --------------------------------------------------------


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_transformers_reads_what_we_write(tmp_path: Path, config: ModelConfig, expert_dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = dataclasses.replace(config, expert_dtype=expert_dtype)
    write_dummy_checkpoint(tmp_path / "m", config, 2, max_shard_bytes=500_000)
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path / "m").float()
    ours = to_hf_state_dict(config, load_weights(tmp_path / "m", torch.float32))
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_state_dict_fits_transformers(plain: ModelConfig, backbone: dict[str, Tensor]) -> None:
    model = hf_model(plain)
    state = to_hf_state_dict(plain, backbone)
    model.load_state_dict(state, strict=True)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}


# -- what we make of theirs -----------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_save_pretrained(tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor], shard_size: str) -> None:
    model = hf_model(plain)
    model.load_state_dict(to_hf_state_dict(plain, backbone))
    model.save_pretrained(tmp_path / "m", max_shard_size=shard_size)
    names = set().union(*(load_file(file) for file in (tmp_path / "m").glob("*.safetensors")))
    # Neither its own names nor the official ones.
    assert {"model.embed_tokens.weight", "head.weight", "model.layers.0.attn.norm.weight"} <= names
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard_size == "200KB")
    check(tmp_path / "m", backbone, "huggingface")


def test_state_dict(tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor]) -> None:
    state = to_hf_state_dict(plain, backbone)
    check(save(tmp_path / "m", plain, state), backbone, "huggingface")


def test_state_dict_without_prefix(tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor]) -> None:
    state = to_hf_state_dict(plain, backbone)
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    check(save(tmp_path / "m", plain, bare), backbone, "huggingface")


def test_experts_one_by_one(tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor]) -> None:
    state = to_hf_state_dict(plain, backbone)
    state = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(plain.num_hidden_layers):
        for e in range(plain.n_routed_experts):
            for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                name = f"model.layers.{layer}.mlp.experts.{e}.{theirs}.weight"
                state[name] = backbone[f"layers.{layer}.ffn.experts.{e}.{ours}.weight"]
    check(save(tmp_path / "m", plain, state), backbone, "huggingface")


@pytest.fixture
def quantised(tmp_path: Path, config: ModelConfig) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The stored tensors of an FP8/FP4 checkpoint, and what they mean."""
    write_dummy_checkpoint(tmp_path / "official", config, 4)
    (file,) = (tmp_path / "official").glob("*.safetensors")
    yield load_file(file), load_weights(tmp_path / "official", torch.float32)


def test_model_prefix(
    tmp_path: Path, config: ModelConfig, quantised: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    tensors, expected = quantised
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    check(save(tmp_path / "m", config, prefixed), expected, "prefixed")


def test_weight_scale_inv(
    tmp_path: Path, config: ModelConfig, quantised: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    tensors, expected = quantised
    renamed = {
        name.removesuffix(".scale") + ".weight_scale_inv" if name.endswith(".scale") else name: t
        for name, t in tensors.items()
    }
    check(save(tmp_path / "m", config, renamed), expected, "huggingface")


# -- errors and names ------------------------------------------------------------------------------


def test_misshaped_merged_experts(tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor]) -> None:
    state = to_hf_state_dict(plain, backbone)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    state[name] = state[name][:, :-1]
    del state["model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(save(tmp_path / "m", plain, state))
    text = str(caught.value)
    assert "wrong shape (1):" in text
    assert f"{name} is [4, 255, 128], expected [4, 256, 128]" in text
    assert "missing (4):" in text and "layers.0.ffn.experts.3.w2.weight" in text


def test_half_an_mtp_block_is_no_mtp_block(
    tmp_path: Path, plain: ModelConfig, backbone: dict[str, Tensor]
) -> None:
    state = to_hf_state_dict(plain, backbone) | {"mtp.0.enorm.weight": torch.ones(128)}
    with pytest.raises(CheckpointError, match=r"mtp\.0\.attn_norm\.weight"):
        Checkpoint.open(save(tmp_path / "m", plain, state))


def test_official_names_stay(config: ModelConfig) -> None:
    for weight in weights(config):
        for spec in weight.tensors():
            assert official_name(spec.name) == spec.name
            assert official_name(f"model.{spec.name}") == spec.name


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("model.layers.12.attn_hc.scale", "layers.12.hc_attn_scale"),
        ("model.layers.0.attn.norm.weight", "layers.0.attn.kv_norm.weight"),
        ("model.layers.0.self_attn.kv_proj.weight_scale_inv", "layers.0.attn.wkv.scale"),
        ("layers.0.mlp.experts.3.up_proj.weight_scale_inv", "layers.0.ffn.experts.3.w3.scale"),
        ("model.layers.4.mlp.experts.down_proj", "layers.4.ffn.experts.down_proj"),
        (
            "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight_scale_inv",
            "layers.2.attn.indexer.wq_b.scale",
        ),
        # What transformers saves of a model that it loaded from its own names.
        ("model.layers.1.attn.compressor.indexer.wkv.weight", "layers.1.attn.indexer.compressor.wkv.weight"),
        ("model.layers.1.attn.compressor.indexer.norm.weight", "layers.1.attn.indexer.compressor.norm.weight"),
        ("model.layers.1.attn.compressor.indexer.q_b_proj.weight", "layers.1.attn.indexer.wq_b.weight"),
        ("model.layers.1.attn.compressor.indexer.position_bias", "layers.1.attn.indexer.compressor.ape"),
        ("model.layers.1.attn.compressor.gate_proj.weight", "layers.1.attn.compressor.wgate.weight"),
        ("model.layers.1.attn.norm.weight", "layers.1.attn.kv_norm.weight"),
        ("model.what.is.this", "what.is.this"),
        ("model.layers.1.self_attn.unheard", "layers.1.self_attn.unheard"),
        ("model.layers.0.mlp.experts.1.2.3.4", "layers.0.ffn.experts.1.2.3.4"),
    ],
)
def test_names(name: str, official: str) -> None:
    assert official_name(name) == official


def test_merged_name() -> None:
    stem = "layers.3.ffn.experts"
    assert merged_name(f"{stem}.7.w1.weight") == (f"{stem}.gate_up_proj", 7)
    assert merged_name(f"{stem}.7.w3.weight") == (f"{stem}.gate_up_proj", 7)
    assert merged_name(f"{stem}.12.w2.weight") == (f"{stem}.down_proj", 12)
    assert merged_name("layers.3.ffn.shared_experts.w1.weight") is None
    assert scale_name(f"{stem}.7.w1.weight") == f"{stem}.7.w1.scale"
