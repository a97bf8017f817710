"""Converted files hold the same values; transformers is the judge of those it reads."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.runtime.checkpoint import reader
from weft.runtime.checkpoint.convert import convert
from weft.runtime.checkpoint.dummy import dummy_weights, write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME, read_headers
from weft.runtime.checkpoint.hf_names import hf_name, official_name, to_hf_state_dict
from weft.runtime.checkpoint.layout import tensor_specs
from weft.runtime.checkpoint.quant import Quantised
from weft.runtime.checkpoint.reader import Checkpoint, load_weights
from weft.runtime.checkpoint.writer import write_official
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError

warnings_of_transformers = pytest.mark.filterwarnings("ignore")  # about its own insides


def from_pretrained(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, told = transformers.DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit: also for formats that cannot be compared, and not a number."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for old in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        old.unlink()
    save_file(tensors, folder / "model.safetensors")


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


# -- transformers ----------------------------------------------------------------------------------


@warnings_of_transformers
@pytest.mark.parametrize("variant", ["fp4", "fp8", "scattered", "refresh"])
def test_transformers_computes_the_same(
    tmp_path: Path, config: ModelConfig, refresh: ModelConfig, scatter: Callable[..., None], variant: str
) -> None:
    chosen = refresh if variant == "refresh" else config
    chosen = dataclasses.replace(chosen, expert_dtype="fp8" if variant == "fp8" else "fp4")
    write_dummy_checkpoint(tmp_path / "official", chosen, 4, max_shard_bytes=300_000)
    expected = load_weights(tmp_path / "official", torch.float32)
    if variant == "scattered":
        scatter(tmp_path / "official", 4)
    convert(tmp_path / "official", tmp_path / "quantised", "huggingface")
    convert(tmp_path / "official", tmp_path / "plain", "huggingface", dequantise=True, max_shard_bytes=700_000)
    ids = torch.randint(0, chosen.vocab_size, (1, 150))
    logits = []
    for name in ("official", "quantised", "plain"):
        model = from_pretrained(tmp_path / name).float()
        assert same(model.state_dict(), to_hf_state_dict(chosen, expected))
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert logits[0].std() > 0.1


@warnings_of_transformers
@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_transformers_keeps_it_quantised_where_it_can(
    tmp_path: Path, config: ModelConfig, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its modules hold codes and scales; the check for a GPU is all that is left out."""
    quantizers = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(quantizers.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    config = dataclasses.replace(config, expert_dtype=experts)
    write_dummy_checkpoint(tmp_path / "official", config, 4, max_shard_bytes=300_000)
    raw = json.loads((tmp_path / "official/config.json").read_text())
    del raw["expert_dtype"]  # as in the first releases; the copy has to tell
    (tmp_path / "official/config.json").write_text(json.dumps(raw))
    convert(tmp_path / "official", tmp_path / "hf", "huggingface")
    held = from_pretrained(tmp_path / "hf").state_dict()
    kept = {hf_name(name): tensor for name, tensor in stored(tmp_path / "official").items()}
    assert held["model.layers.1.self_attn.q_a_proj.weight"].dtype == torch.float8_e4m3fn
    attention = {name: tensor for name, tensor in held.items() if ".mlp.experts." not in name}
    assert all(same({name: kept[name].to(t.dtype)}, {name: t}) for name, t in attention.items())
    for part, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        stem = "model.layers.2.mlp.experts"
        down = torch.stack([kept[f"{stem}.{i}.w2.{part}"].view(torch.uint8) for i in range(4)])
        up = torch.stack([kept[f"{stem}.{i}.w3.{part}"].view(torch.uint8) for i in range(4)])
        assert torch.equal(held[f"{stem}.down_proj{suffix}"].view(torch.uint8), down)
        assert torch.equal(held[f"{stem}.gate_up_proj{suffix}"].view(torch.uint8)[:, -up.shape[1] :], up)


@warnings_of_transformers
def test_a_model_saved_by_transformers_becomes_official(tmp_path: Path, config: ModelConfig) -> None:
    """Dequantised by us: transformers 5.23 cannot save what it dequantised itself."""
    write_dummy_checkpoint(tmp_path / "a", config, 4)
    convert(tmp_path / "a", tmp_path / "plain", "huggingface", dequantise=True)
    from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    convert(tmp_path / "hf", tmp_path / "b", "official")
    before, after = load_weights(tmp_path / "a", torch.float32), Checkpoint.open(tmp_path / "b")
    assert after.layout == "official" and not after.config.has_mtp
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.load(torch.float32))


# -- values written anew ---------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_dequantised(tmp_path: Path, config: ModelConfig, experts: str) -> None:
    config = dataclasses.replace(config, expert_dtype=experts)
    write_dummy_checkpoint(tmp_path / "a", config, 1, tokenizer_json="{}", max_shard_bytes=300_000)
    (tmp_path / "a/LICENSE").write_text("free")
    convert(tmp_path / "a", tmp_path / "hf", "huggingface", dequantise=True, max_shard_bytes=400_000)
    plain = dataclasses.replace(config, quantization_config=None)
    found = {stored.spec.name: stored.spec for stored in read_headers(tmp_path / "hf").tensors}
    assert found == {hf_name(s.name): dataclasses.replace(s, name=hf_name(s.name)) for s in tensor_specs(plain)}
    assert ModelConfig.load(tmp_path / "hf") == plain
    assert (tmp_path / "hf/LICENSE").read_text() + (tmp_path / "hf/tokenizer.json").read_text() == "free{}"
    expected = load_weights(tmp_path / "a", torch.float32)
    assert same(load_weights(tmp_path / "hf", torch.float32), expected)
    # Back, the values are the same; scales are chosen anew.
    convert(tmp_path / "hf", tmp_path / "b", "official", max_shard_bytes=300_000)
    assert same(load_weights(tmp_path / "b", torch.float32), expected)
    assert ModelConfig.load(tmp_path / "b") == config
    assert {p.name for p in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}


def test_fp8_experts_stay_fp8_whatever_the_config_says(tmp_path: Path, config: ModelConfig) -> None:
    write_dummy_checkpoint(tmp_path / "a", dataclasses.replace(config, expert_dtype="fp8"), 1)
    (tmp_path / "a/config.json").write_text(json.dumps(config.to_dict()))
    convert(tmp_path / "a", tmp_path / "hf", "huggingface", dequantise=True)
    convert(tmp_path / "hf", tmp_path / "b", "official")
    assert same(load_weights(tmp_path / "b", torch.float32), load_weights(tmp_path / "a", torch.float32))
    assert ModelConfig.load(tmp_path / "b").expert_dtype == "fp8"


def test_a_huggingface_checkpoint_is_dequantised_too(folder: Path) -> None:
    convert(folder, folder.with_name("hf"), "huggingface")
    convert(folder.with_name("hf"), folder.with_name("a"), "huggingface", dequantise=True)
    convert(folder, folder.with_name("b"), "huggingface", dequantise=True)
    files = [{p.name: p.read_bytes() for p in folder.with_name(name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("merged", [False, True])
def test_floats_are_quantised_as_the_writer_does(
    tmp_path: Path, config: ModelConfig, plain: ModelConfig, merged: bool
) -> None:
    """float32 values: nothing is rounded to bfloat16 on the way."""
    made = dummy_weights(plain, 5)
    if merged:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
        state = to_hf_state_dict(plain, made)
        made = {name: tensor for name, tensor in made.items() if not name.startswith("mtp.")}
    else:
        state = {hf_name(name): tensor for name, tensor in made.items()}
    (tmp_path / "hf").mkdir()
    raw = plain.to_dict() | {"torch_dtype": "float32", "novel": 1}
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "a", "official", max_shard_bytes=300_000)
    write_official(tmp_path / "b", config, made, max_shard_bytes=300_000)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def test_half_quantised_files_are_written_anew(folder: Path, config: ModelConfig) -> None:
    convert(folder, folder.with_name("hf"), "huggingface", dequantise=True)
    plain, quantised = stored(folder.with_name("hf")), stored(folder)
    name = "layers.1.ffn.experts.2.w1.weight"
    plain[hf_name(name)] = quantised[name]
    plain[hf_name(name) + "_scale_inv"] = quantised[name.replace("weight", "scale")]
    rewrite(folder.with_name("hf"), plain)
    (folder.with_name("hf") / "config.json").write_bytes((folder / "config.json").read_bytes())
    convert(folder.with_name("hf"), folder.with_name("b"), "official")
    found = {stored.spec.name: stored.spec for stored in read_headers(folder.with_name("b")).tensors}
    assert found == {spec.name: spec for spec in tensor_specs(config)}
    assert same(load_weights(folder.with_name("b"), torch.float32), load_weights(folder, torch.float32))


def test_values_that_cannot_be_quantised(folder: Path) -> None:
    convert(folder, folder.with_name("hf"), "huggingface", dequantise=True)
    tensors = stored(folder.with_name("hf"))
    tensors["model.layers.1.mlp.experts.2.w1.weight"][0, 0] = torch.inf
    rewrite(folder.with_name("hf"), tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w1\.weight has values that are not"):
        convert(folder.with_name("hf"), folder.with_name("b"), "official")
    assert not folder.with_name("b").exists()


def test_mtp_that_the_config_does_not_describe(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 0}))
    convert(folder, folder.with_name("hf"), "huggingface")  # goes along as it is
    with pytest.raises(CheckpointError, match=r"does not describe \d+ tensors under mtp"):
        convert(folder, folder.with_name("b"), "huggingface", dequantise=True)


# -- tensors on demand -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_demand(folder: Path, scatter: Callable[..., None], dtype: torch.dtype) -> None:
    scatter(folder, 6)
    checkpoint = Checkpoint.open(folder)
    assert same(dict(checkpoint.on_demand(dtype)), dict(checkpoint.load(dtype)))


def test_stored_values_are_those_that_are_loaded(folder: Path, scatter: Callable[..., None]) -> None:
    scatter(folder, 6)
    checkpoint = Checkpoint.open(folder)
    told: list[tuple[int, int, str]] = []
    found = dict(checkpoint.stored(lambda *args: told.append(args)))
    assert told[-1][0] == told[-1][1] == checkpoint.nbytes and len(told) == len(found)
    for name, want in checkpoint.load(torch.float32):
        value = found[name]
        if isinstance(value, Quantised):
            assert value.scale.dtype == torch.float8_e8m0fnu
            value = value.dequantised(torch.float32)
        assert torch.equal(value.to(want.dtype), want), name
    kinds = {value.is_fp4 for value in found.values() if isinstance(value, Quantised)}
    assert kinds == {True, False}


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_float32_scales_are_taken_if_they_are_powers_of_two(folder: Path, factor: float) -> None:
    tensors = stored(folder)
    name = next(name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn)
    scale = name.removesuffix("weight") + "scale"
    tensors[scale] = tensors[scale].float() * factor
    rewrite(folder, tensors)
    value = Checkpoint.open(folder).stored()[name]
    want = dict(Checkpoint.open(folder).load(torch.float32))[name]
    assert isinstance(value, Quantised) == (factor == 1.0)
    got = value.dequantised(torch.float32) if isinstance(value, Quantised) else value
    assert torch.equal(got, want)


class Shard:
    """An open file that can be watched."""

    alive: ClassVar[weakref.WeakSet[Shard]] = weakref.WeakSet()
    opened: ClassVar[list[str]] = []

    def __init__(self, path: Path, framework: str) -> None:
        self._inner = safe_open(path, framework)
        self.alive.add(self)
        self.opened.append(path.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_few_files_are_open_and_seldom_opened(
    tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dummy_checkpoint(tmp_path / "m", config, 1, max_shard_bytes=150_000)
    monkeypatch.setattr(reader, "safe_open", Shard)
    tensors = Checkpoint.open(tmp_path / "m").on_demand(torch.float32)
    most = 0
    for name in tensors:
        assert tensors[name].isfinite().all()
        most = max(most, len(Shard.alive))
    assert most == 4
    assert Shard.opened == sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))


def test_a_file_damaged_meanwhile(folder: Path) -> None:
    tensors = Checkpoint.open(folder).on_demand(torch.float32)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(b"")
    with pytest.raises(CheckpointError, match=last.name):
        dict(tensors)


def test_names_are_inverse(config: ModelConfig, refresh: ModelConfig) -> None:
    for chosen in (config, refresh):
        names = [spec.name for spec in tensor_specs(chosen)]
        assert [official_name(hf_name(name)) for name in names] == names
        assert len({hf_name(name) for name in names}) == len(names)
