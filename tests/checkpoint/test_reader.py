"""Reading: values, dtypes, and one message that lists all that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.runtime.checkpoint.dummy import DummyWeights, dummy_weights, write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.checkpoint.layout import weights
from weft.runtime.checkpoint.reader import Checkpoint, load_weights
from weft.runtime.checkpoint.writer import write_official
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError, ConfigError


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """All tensors in one file, without an index."""
    for old in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        old.unlink()
    save_file(tensors, folder / "model.safetensors")


def complaint(folder: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, config)
    return str(caught.value)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantised_files_come_back_exactly(tmp_path: Path, plain: ModelConfig, dtype: torch.dtype) -> None:
    made = DummyWeights(plain, 1)
    low = {w.name: made[w.name].bfloat16() for w in weights(plain) if w.storage == "bf16"}
    write_official(tmp_path / "m", plain, {**made, **low})
    assert not any(name.endswith(".scale") for name in stored(tmp_path / "m"))
    expected = dummy_weights(plain, 1, dtype)
    for name, tensor in low.items():
        expected[name] = tensor.to(expected[name].dtype)
    assert same(load_weights(tmp_path / "m", dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    loaded = load_weights(folder, dtype)
    for weight in weights(config):
        tensor = loaded.pop(weight.name)
        assert tuple(tensor.shape) == weight.shape
        if weight.role == "expert_table":
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == (torch.float32 if weight.is_float32 else dtype), weight.name
    assert not loaded


def test_bfloat16_is_exact(folder: Path) -> None:
    full, half = load_weights(folder, torch.float32), load_weights(folder, torch.bfloat16)
    assert all(torch.equal(full[name], half[name].to(full[name].dtype)) for name in full)


def test_loaded_values_are_near_the_written_ones(folder: Path, config: ModelConfig) -> None:
    loaded, made = load_weights(folder, torch.float32), dummy_weights(config, 1)
    for weight in weights(config):
        error = (loaded[weight.name] - made[weight.name]).abs().max().item()
        largest = made[weight.name].abs().max().item()
        # Half a step of the format at the largest value; at 5 that of FP4 is 1.
        step = {"fp4": 1 / 5, "fp8": 1 / 16, "bf16": 1 / 256, "f32": 0, "i64": 0}
        assert error <= step[weight.storage] * largest, weight.name


def test_files_describe_their_own_formats(tmp_path: Path, config: ModelConfig) -> None:
    """config.json says FP4 experts; the "-Base" files hold FP8 ones, a converted copy floats."""
    base = dataclasses.replace(config, expert_dtype="fp8")
    write_dummy_checkpoint(tmp_path / "base", base, 1)
    expected = load_weights(tmp_path / "base", torch.float32)
    assert same(load_weights(tmp_path / "base", torch.float32, config=config), expected)
    (tmp_path / "float").mkdir()
    (tmp_path / "float/config.json").write_text(json.dumps(config.to_dict()))
    save_file(expected, tmp_path / "float/model.safetensors")
    assert same(load_weights(tmp_path / "float", torch.float32), expected)


def test_scales_in_other_files(folder: Path) -> None:
    expected, tensors = load_weights(folder, torch.float32), stored(folder)
    # Both orders occur: scales read before and after the file of their matrix.
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
    first = {name: scales.pop(name) for name in list(scales)[::2]}
    rewrite(folder, tensors)
    save_file(first, folder / "a.safetensors")
    save_file(scales, folder / "z.safetensors")
    assert same(load_weights(folder, torch.float32), expected)


def test_float32_scales(folder: Path) -> None:
    expected, tensors = load_weights(folder, torch.float32), stored(folder)
    floats = {k: v.float() if k.endswith(".scale") else v for k, v in tensors.items()}
    rewrite(folder, floats)
    assert same(load_weights(folder, torch.float32), expected)


# -- MTP ---------------------------------------------------------------------------------------


def test_mtp_can_be_left_out(folder: Path, config: ModelConfig) -> None:
    without = dataclasses.replace(config, num_nextn_predict_layers=0)
    checkpoint = Checkpoint.open(folder, without)
    assert checkpoint.skipped and all(name.startswith("mtp.0.") for name in checkpoint.skipped)
    count = len(checkpoint.skipped)
    assert checkpoint.notices == (f"no MTP block in the config: no speculation ({count} tensors under mtp.*)",)
    loaded = load_weights(folder, torch.float32)
    for name, tensor in checkpoint.load(torch.float32):
        assert torch.equal(tensor, loaded.pop(name))
    assert all(name.startswith("mtp.0.") for name in loaded)


def test_official_files_must_hold_the_mtp_block(folder: Path) -> None:
    rewrite(folder, {k: v for k, v in stored(folder).items() if not k.startswith("mtp.")})
    assert "mtp.0.e_proj.weight" not in complaint(folder)  # capped, but counted
    assert "mtp.0.attn_norm.weight" in complaint(folder)


# -- what can be wrong -------------------------------------------------------------------------


def test_all_problems_are_listed_at_once(folder: Path) -> None:
    tensors = stored(folder)
    del tensors["norm.weight"], tensors["layers.1.attn.wq_a.scale"]
    tensors["surplus"] = torch.zeros(1)
    tensors["layers.0.attn.q_norm.weight"] = torch.zeros(3)
    tensors["layers.0.ffn.experts.1.w1.scale"] = torch.zeros(128, 4, dtype=torch.int32)
    tensors["layers.0.ffn.gate.tid2eid"] = torch.zeros(64, 3)
    tensors["layers.2.attn.wkv.weight"] = torch.zeros(1, 1, dtype=torch.int16)
    rewrite(folder, tensors)
    save_file({"head.weight": tensors["head.weight"]}, folder / "twice.safetensors")
    assert complaint(folder).splitlines() == [
        f"{folder}: 10 problem(s) in 2 file(s), official layout",
        "  missing (2):",
        "    norm.weight",
        "    layers.1.attn.wq_a.scale",
        "  stored twice (1):",
        "    head.weight in model.safetensors and twice.safetensors",
        "  unexpected (2):",
        "    layers.2.attn.wkv.scale",
        "    surplus",
        "  wrong dtype (3):",
        "    layers.0.ffn.gate.tid2eid is F32, expected I64 or I32",
        "    layers.0.ffn.experts.1.w1.scale is I32, expected F8_E8M0 or F32",
        "    layers.2.attn.wkv.weight is I16, expected BF16 or F16 or F32 or F8_E4M3 or I8",
        "  wrong shape (2):",
        "    layers.0.attn.q_norm.weight is [3], expected [128]",
        "    layers.2.attn.wkv.weight is [1, 1], expected [64, 128]",
    ]


def test_long_lists_are_cut(folder: Path, config: ModelConfig) -> None:
    rewrite(folder, {"embed.weight": stored(folder)["embed.weight"]})
    text = complaint(folder)
    count = sum(1 for _ in weights(config)) - 1
    assert f"missing ({count}):" in text
    assert f"... and {count - 20} more" in text
    assert len(text.splitlines()) == 23


def test_quantised_tensors_need_a_quantised_config(folder: Path, plain: ModelConfig) -> None:
    text = complaint(folder, plain)
    assert "layers.0.attn.wq_a.weight is F8_E4M3, expected BF16 or F16 or F32" in text
    assert "layers.0.attn.wq_a.scale" in text


def test_config_of_another_model(folder: Path, config: ModelConfig) -> None:
    wider = dataclasses.replace(config, q_lora_rank=256)
    assert "wq_a.weight is [128, 128], expected [256, 128]" in complaint(folder, wider)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    text = complaint(folder)
    assert f"{file.name} (" in text
    assert "1 problem(s)" in text  # what it held is not reported as missing


def test_garbage_file(folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"PK\x03\x04" * 100)
    (folder / INDEX_NAME).unlink()
    assert "model-00001-of-00001.safetensors (" in complaint(folder)


def test_missing_shard(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.unlink()
    text = complaint(folder)
    assert file.name in text and "1 problem(s)" in text


def test_file_damaged_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        list(checkpoint.load(torch.float32))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    assert INDEX_NAME in complaint(folder)


def test_no_checkpoint(tmp_path: Path, config: ModelConfig) -> None:
    assert "holds no .safetensors file" in complaint(tmp_path, config)
    assert "is not a folder" in complaint(tmp_path / "none", config)
    with pytest.raises(ConfigError, match="file not found"):
        Checkpoint.open(tmp_path)
