"""The layout against the published listings (tensor counts and sizes of the released files)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from weft.runtime.checkpoint.layout import TensorSpec, tensor_specs, weights
from weft.runtime.config import ModelConfig, Quantization, preset
from weft.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "tensors", "size", "gib"),
    [
        ("flash", 69_187, 159_609_485_896, "148.65"),
        ("pro", 145_116, 864_704_792_696, "805.32"),
    ],
)
def test_released_checkpoints(name: str, tensors: int, size: int, gib: str) -> None:
    specs = list(tensor_specs(preset(name)))
    assert len(specs) == len({spec.name for spec in specs}) == tensors
    total = sum(spec.nbytes for spec in specs)
    assert total == size
    assert f"{total / 2**30:.2f}" == gib


def test_shapes_of_flash() -> None:
    found = {spec.name: spec for spec in tensor_specs(preset("flash"))}
    for name, dtype, shape in (
        ("embed.weight", "BF16", (129280, 4096)),
        ("hc_head_fn", "F32", (4, 16384)),
        ("hc_head_scale", "F32", (1,)),
        ("layers.0.hc_attn_fn", "F32", (24, 16384)),
        ("layers.0.hc_ffn_scale", "F32", (3,)),
        ("layers.0.attn.attn_sink", "F32", (64,)),
        ("layers.0.attn.wo_a.weight", "F8_E4M3", (8192, 4096)),
        ("layers.0.attn.wo_a.scale", "F8_E8M0", (64, 32)),
        ("layers.0.attn.wkv.scale", "F8_E8M0", (4, 32)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.2.attn.compressor.wkv.weight", "BF16", (1024, 4096)),
        ("layers.3.attn.compressor.ape", "F32", (128, 512)),
        ("layers.3.attn.compressor.wgate.weight", "BF16", (512, 4096)),
        ("layers.2.attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1024)),
        ("layers.2.attn.indexer.compressor.ape", "F32", (4, 256)),
        ("layers.2.attn.indexer.compressor.norm.weight", "BF16", (128,)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.3.ffn.gate.bias", "F32", (256,)),
        ("layers.3.ffn.experts.255.w1.weight", "I8", (2048, 2048)),
        ("layers.3.ffn.experts.255.w2.weight", "I8", (4096, 1024)),
        ("layers.3.ffn.experts.255.w2.scale", "F8_E8M0", (4096, 64)),
        ("mtp.0.ffn.gate.bias", "F32", (256,)),
        ("mtp.0.h_proj.weight", "F8_E4M3", (4096, 4096)),
        ("mtp.0.hc_head_fn", "F32", (4, 16384)),
    ):
        assert found[name] == TensorSpec(name, dtype, shape)
    assert "layers.0.attn.compressor.ape" not in found
    assert "layers.3.attn.indexer.wq_b.weight" not in found


def test_base_checkpoints_have_fp8_experts(config: ModelConfig) -> None:
    base = dataclasses.replace(config, expert_dtype="fp8")
    found = {spec.name: spec for spec in tensor_specs(base)}
    assert found["layers.0.ffn.experts.0.w1.weight"].dtype == "F8_E4M3"
    assert found["layers.0.ffn.experts.0.w1.scale"].shape == (1, 1)


def test_without_quantisation_everything_is_plain(plain: ModelConfig) -> None:
    specs = list(tensor_specs(plain))
    assert {spec.dtype for spec in specs} == {"BF16", "F32", "I64"}
    assert [spec.name for spec in specs] == [weight.name for weight in weights(plain)]


def test_grids_of_odd_sizes_round_up(config: ModelConfig) -> None:
    odd = dataclasses.replace(config, moe_intermediate_size=130, q_lora_rank=129)
    found = {spec.name: spec.shape for spec in tensor_specs(odd)}
    assert found["layers.0.attn.wq_a.scale"] == (2, 1)
    assert found["layers.0.ffn.experts.0.w2.weight"] == (128, 65)
    assert found["layers.0.ffn.experts.0.w2.scale"] == (128, 5)


def test_what_stays_in_float32(config: ModelConfig) -> None:
    low = {w.name.rsplit(".", 2)[-2] for w in weights(config) if not w.is_float32}
    assert low == {
        *("embed", "wq_a", "wq_b", "wkv", "wo_a", "wo_b", "weights_proj", "gate"),
        *("w1", "w2", "w3", "e_proj", "h_proj"),
    }
    by_name = {w.name: w for w in weights(config)}
    assert not by_name["layers.1.attn.wkv.weight"].is_float32
    assert not by_name["layers.0.ffn.gate.tid2eid"].is_float32
    for name in (
        *("head.weight", "norm.weight", "layers.0.ffn.gate.weight", "layers.1.ffn.gate.bias"),
        *("layers.1.attn.compressor.wkv.weight", "layers.1.attn.indexer.compressor.wgate.weight"),
    ):
        assert by_name[name].is_float32, name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quantization_config", Quantization(weight_block_size=(32, 32)), "must be 128x128"),
        ("moe_intermediate_size", 127, "must be even"),
    ],
)
def test_layouts_that_cannot_be(config: ModelConfig, field: str, value: object, message: str) -> None:
    changed = dataclasses.replace(config, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        list(tensor_specs(changed))


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, weft.runtime.sizes, weft.runtime.checkpoint.layout, "
        "weft.runtime.checkpoint.headers; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
