"""V4-Flash-0731: DSpark stages under `mtp.*`, known by name and left alone, without a word too little."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.runtime.checkpoint.convert import convert
from weft.runtime.checkpoint.dummy import DummyWeights, dummy_weights, write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.checkpoint.layout import draft_weights, tensor_specs, weights
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.config import ModelConfig, preset
from weft.runtime.errors import CheckpointError, ConfigError
from weft.runtime.sizes import parameters, report


@pytest.fixture
def stages(tmp_path: Path, refresh: ModelConfig) -> Path:
    write_dummy_checkpoint(tmp_path / "model", refresh, seed=1, max_shard_bytes=500_000)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def flash_0731() -> ModelConfig:
    """By its config.json."""
    raw = preset("flash").to_dict()
    raw["compress_ratios"] = [0, 0, *[4, 128] * 20, 4, 0, 0, 0]
    raw |= {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_markov_rank": 256}
    return ModelConfig.from_dict(raw | {"dspark_target_layer_ids": [40, 41, 42]})


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for old in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        old.unlink()
    save_file(tensors, folder / "model.safetensors")


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


# -- the released files ----------------------------------------------------------------------------


def test_config(flash_0731: ModelConfig) -> None:
    assert len(flash_0731.compress_ratios) == 46
    assert not flash_0731.has_mtp and not flash_0731.unknown_keys
    assert flash_0731.layer_kinds == preset("flash").layer_kinds


def test_tensors(flash_0731: ModelConfig) -> None:
    """Counts and sizes that its index and the headers of its last three shards state."""
    specs = list(tensor_specs(flash_0731))
    assert len(specs) == len({spec.name for spec in specs}) == 72_317
    assert sum(spec.nbytes for spec in specs) == 166_878_536_440
    drafts = [spec for spec in specs if spec.name.startswith("mtp.")]
    assert Counter(spec.name[:5] for spec in drafts) == {"mtp.0": 1568, "mtp.1": 1565, "mtp.2": 1572}
    assert Counter(spec.dtype for spec in drafts) == {
        **{"I8": 3 * 768, "F8_E8M0": 3 * 776 + 1, "F8_E4M3": 3 * 8 + 1},
        **{"BF16": 20, "F32": 27},
    }
    found = {spec.name: spec.shape for spec in drafts}
    for name, shape in (
        ("mtp.0.main_proj.weight", (4096, 12288)),
        ("mtp.0.main_proj.scale", (32, 96)),
        ("mtp.0.main_norm.weight", (4096,)),
        ("mtp.1.ffn.experts.255.w2.weight", (4096, 1024)),
        ("mtp.2.norm.weight", (4096,)),
        ("mtp.2.hc_head_fn", (4, 16384)),
        ("mtp.2.markov_head.markov_w1.weight", (129280, 256)),
        ("mtp.2.markov_head.markov_w2.weight", (129280, 256)),
        ("mtp.2.confidence_head.proj.weight", (1, 4352)),
    ):
        assert found[name] == shape
    assert not any(name.endswith(("e_proj.weight", "h_proj.weight", "enorm.weight")) for name in found)


def test_the_model_is_that_of_flash_without_mtp(flash_0731: ModelConfig) -> None:
    without = dataclasses.replace(preset("flash"), num_nextn_predict_layers=0)
    assert list(weights(flash_0731)) == list(weights(without))
    assert parameters(flash_0731) == parameters(without)


def test_info_says_so(flash_0731: ModelConfig) -> None:
    rows = dict(report(flash_0731))
    assert rows["DSpark draft stages"] == "not used: no speculation"
    assert rows["checkpoint tensors"] == "72,317"
    assert "MTP parameters" not in rows


def test_the_last_stage_makes_the_logits(refresh: ModelConfig) -> None:
    two = dataclasses.replace(refresh, compress_ratios=refresh.compress_ratios[:-1])
    names = {weight.name for weight in draft_weights(two)}
    assert "mtp.1.markov_head.markov_w1.weight" in names and "mtp.0.norm.weight" not in names
    assert {name.split(".")[1] for name in names} == {"0", "1"}


@pytest.mark.parametrize("field", ["dspark_markov_rank", "dspark_target_layer_ids"])
def test_keys_that_belong_together(refresh: ModelConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = None: missing beside dspark_block_size"):
        list(tensor_specs(dataclasses.replace(refresh, **{field: None})))  # type: ignore[arg-type]


# -- reading ---------------------------------------------------------------------------------------


def test_stages_are_skipped_and_it_says_so(stages: Path, refresh: ModelConfig) -> None:
    checkpoint = Checkpoint.open(stages)
    names = {spec.name for weight in draft_weights(refresh) for spec in weight.tensors()}
    assert set(checkpoint.skipped) == names
    assert checkpoint.notices == (
        f"DSpark draft stages are not used: no speculation ({len(names)} tensors under mtp.*)",
    )
    assert not checkpoint.config.has_mtp
    loaded = dict(checkpoint.load(torch.float32))
    assert loaded.keys() == dummy_weights(refresh, 1).keys()
    assert not any(name.startswith("mtp.") for name in loaded)


def test_other_checkpoints_have_nothing_to_say(folder: Path) -> None:
    assert Checkpoint.open(folder).notices == ()


def test_a_misspelt_stage_is_unexpected(stages: Path) -> None:
    tensors = stored(stages)
    tensors["mtp.0.main_proj.wieght"] = tensors.pop("mtp.0.main_proj.weight")
    tensors["mtp.1.main_norm.weight"] = tensors["mtp.0.main_norm.weight"].clone()
    tensors["mtp.3.norm.weight"] = tensors["mtp.2.norm.weight"].clone()
    rewrite(stages, tensors)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(stages)
    assert str(caught.value).splitlines()[1:] == [
        "  unexpected (3):",
        "    mtp.0.main_proj.wieght",
        "    mtp.1.main_norm.weight",
        "    mtp.3.norm.weight",
    ]


def test_stages_may_be_left_out(stages: Path) -> None:
    """They are not used, so their absence is no reason to refuse."""
    rewrite(stages, {name: t for name, t in stored(stages).items() if not name.startswith("mtp.")})
    checkpoint = Checkpoint.open(stages)
    assert checkpoint.skipped == checkpoint.notices == ()


def test_stages_can_be_asked_for(stages: Path, refresh: ModelConfig) -> None:
    checkpoint = Checkpoint.open(stages, drafts=True)
    assert checkpoint.skipped == checkpoint.notices == ()
    assert dict(checkpoint.load(torch.float32)).keys() == set(DummyWeights(refresh, 1))
    rewrite(stages, {name: t for name, t in stored(stages).items() if name != "mtp.2.norm.weight"})
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    mtp\.2\.norm\.weight"):
        Checkpoint.open(stages, drafts=True)


# -- converting (byte for byte: test_convert.py) ----------------------------------------------------


def test_stages_go_along_dequantised(stages: Path) -> None:
    convert(stages, stages.with_name("hf"), "huggingface", dequantise=True)
    convert(stages.with_name("hf"), stages.with_name("back"), "official")
    every = [
        dict(Checkpoint.open(stages.with_name(name), drafts=True).load(torch.float32))
        for name in ("model", "hf", "back")
    ]
    assert all(torch.equal(tensor, other[name]) for other in every for name, tensor in every[0].items())
    assert json.loads((stages.with_name("back") / "config.json").read_text()) == json.loads(
        (stages / "config.json").read_text()
    )


def test_files_saved_by_transformers_hold_no_stages(stages: Path) -> None:
    convert(stages, stages.with_name("hf"), "huggingface", dequantise=True)
    rewrite(
        stages.with_name("hf"),
        {name: t for name, t in stored(stages.with_name("hf")).items() if not name.startswith("mtp.")},
    )
    convert(stages.with_name("hf"), stages.with_name("back"), "official")
    config = ModelConfig.load(stages.with_name("back"))
    assert (config.dspark_block_size, config.num_nextn_predict_layers) == (None, 0)
    assert Checkpoint.open(stages.with_name("back")).notices == ()
