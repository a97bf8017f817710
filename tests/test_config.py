"""config.json as published, as transformers writes it, and everything that can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.hf import hf_config
from weft.runtime.config import PRESETS, ModelConfig, Quantization, RopeScaling, preset
from weft.runtime.errors import ConfigError

# The published config.json of both models (the later revision, which adds expert_dtype).
COMMON: dict[str, Any] = json.loads("""{
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1", "use_cache": true, "initializer_range": 0.02,
    "vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": false,
    "max_position_embeddings": 1048576, "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                     "beta_fast": 32, "beta_slow": 1},
    "head_dim": 512, "qk_rope_head_dim": 64, "num_key_value_heads": 1, "o_lora_rank": 1024,
    "attention_bias": false, "attention_dropout": 0.0, "sliding_window": 128,
    "index_n_heads": 64, "index_head_dim": 128,
    "num_experts_per_tok": 6, "n_shared_experts": 1, "num_hash_layers": 3, "norm_topk_prob": true,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "hidden_act": "silu", "swiglu_limit": 10.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-06, "rms_norm_eps": 1e-06,
    "num_nextn_predict_layers": 1, "expert_dtype": "fp4",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
}""")
FLASH = COMMON | json.loads("""{
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
    "n_routed_experts": 256, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "index_topk": 512
}""")
FLASH["compress_ratios"] = [0, 0, *[4, 128] * 20, 4, 0]
PRO = COMMON | json.loads("""{
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5, "index_topk": 1024
}""")
PRO["compress_ratios"] = [128, 128, *[4, 128] * 29, 4, 0]
FLASH_0731 = FLASH | json.loads("""{
    "dspark_block_size": 5, "dspark_markov_rank": 256, "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42]
}""")
FLASH_0731["compress_ratios"] = [*FLASH["compress_ratios"], 0, 0]


# -- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "raw"), [("flash", FLASH), ("pro", PRO)])
def test_presets_are_the_published_models(name: str, raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    assert config == preset(name)
    assert config.unknown_keys == ()
    assert config.to_dict() == json.loads(json.dumps(raw), object_hook=_tuples)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def test_layer_kinds_of_the_published_models() -> None:
    flash, pro = preset("flash"), preset("pro")
    assert [flash.count(kind) for kind in ("window", "c4a", "c128a")] == [2, 21, 20]
    assert [pro.count(kind) for kind in ("window", "c4a", "c128a")] == [0, 30, 31]
    assert flash.layer_kinds[:4] == ("window", "window", "c4a", "c128a")
    assert (flash.nope_head_dim, flash.hc_mix_size, flash.has_mtp) == (448, 24, True)
    assert [flash.is_hash_layer(i) for i in (0, 2, 3)] == [True, True, False]


def test_the_refresh_has_draft_stages_instead_of_an_mtp_block() -> None:
    config = ModelConfig.from_dict(FLASH_0731)
    assert (config.has_mtp, config.unknown_keys) == (False, ())
    assert config.layer_kinds == preset("flash").layer_kinds
    assert not dataclasses.replace(preset("flash"), num_nextn_predict_layers=0).has_mtp


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelConfig.from_dict(FLASH_0731)])
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.load(tmp_path) == ModelConfig.load(tmp_path / "config.json") == config


def test_round_trip_without_the_optional_parts() -> None:
    config = dataclasses.replace(preset("tiny"), rope_scaling=None, quantization_config=None)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert not {"rope_scaling", "quantization_config"} & config.to_dict().keys()


def test_unknown_keys_are_collected() -> None:
    raw = FLASH | {"zeta": 1, "alpha": {"b": 2}, "pad_token_id": 2}
    config = ModelConfig.from_dict(raw)
    assert config.unknown_keys == ("alpha", "zeta")
    assert dataclasses.replace(config, unknown_keys=()) == preset("flash")
    assert not {"alpha", "zeta", "unknown_keys"} & config.to_dict().keys()


# -- as newer transformers releases write it -----------------------------------------------------------

_NAMES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_REPLACED = (
    "compress_ratios num_hash_layers qk_rope_head_dim rope_theta compress_rope_theta rope_scaling torch_dtype"
)


def newer(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    yarn = {key: value for key, value in raw["rope_scaling"].items() if key != "type"}
    main = {"rope_type": "default", "rope_theta": raw["rope_theta"], "partial_rotary_factor": 0.125}
    compress = {"rope_type": "yarn", "rope_theta": raw["compress_rope_theta"], "attention_factor": 1.0}
    return {key: value for key, value in raw.items() if key not in _REPLACED.split()} | {
        "layer_types": [_NAMES[ratio] for ratio in raw["compress_ratios"][:layers]],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * (layers - 3),
        "partial_rotary_factor": 0.125,
        "rope_parameters": {"main": main, "compress": yarn | compress},
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(("name", "raw"), [("flash", FLASH), ("pro", PRO)])
def test_newer_keys_say_the_same(name: str, raw: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(newer(raw)) == preset(name)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_what_transformers_writes_itself(config: ModelConfig) -> None:
    plain = dataclasses.replace(config, quantization_config=None, torch_dtype="float32")
    read = ModelConfig.from_dict(json.loads(hf_config(config).to_json_string(use_diff=False)))
    assert read.unknown_keys == ()
    assert dataclasses.replace(read, transformers_version=plain.transformers_version) == plain


def test_published_keys_win_over_newer_ones() -> None:
    other = newer(PRO) | {"mlp_layer_types": ["moe"] * 61, "partial_rotary_factor": 0.5, "dtype": "float32"}
    other["rope_parameters"] = {"main": {"rope_theta": 5.0}, "compress": {"rope_theta": 6.0}}
    assert ModelConfig.from_dict(other | FLASH) == preset("flash")


def test_newer_rope_without_yarn() -> None:
    raw = newer(FLASH)
    raw["rope_parameters"]["compress"] = {"rope_type": "default", "rope_theta": 160000}
    assert ModelConfig.from_dict(raw).rope_scaling is None


# -- what is refused -----------------------------------------------------------------------------------

_MAY_BE_ZERO = {"attention_dropout", "initializer_range", "routed_scaling_factor", "num_hash_layers"}
_MAY_BE_ZERO |= {"num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
_POSITIVE = [
    field.name
    for field in dataclasses.fields(ModelConfig)
    if type(field.default) in (int, float) and field.name not in _MAY_BE_ZERO
]
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in _POSITIVE for value in (0, -1)),
    ("num_key_value_heads", 2),
    ("n_shared_experts", 2),
    ("scoring_func", "sigmoid"),
    ("topk_method", "greedy"),
    ("norm_topk_prob", False),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("tie_word_embeddings", True),
    ("expert_dtype", "int4"),
    ("compress_ratios", (0,) * 42),
    ("compress_ratios", (*(0,) * 42, 8, 0)),
    ("compress_ratios", (*(0,) * 43, 4)),
    ("qk_rope_head_dim", 63),
    ("qk_rope_head_dim", 2),
    ("qk_rope_head_dim", 514),
    ("qk_rope_head_dim", 130),  # more than index_head_dim
    ("index_head_dim", 96),
    ("o_groups", 7),
    ("num_experts_per_tok", 257),
    ("num_hash_layers", -1),
    ("num_nextn_predict_layers", -1),
    ("bos_token_id", 129280),
    ("eos_token_id", -1),
    ("rms_norm_eps", math.nan),
    ("rope_theta", math.nan),
]
MISTYPED: list[tuple[str, Any]] = [
    ("hidden_size", "4096"),
    ("hidden_size", 4096.0),
    ("hidden_size", True),
    ("hidden_size", None),
    ("rms_norm_eps", "1e-6"),
    ("swiglu_limit", False),
    ("hidden_act", 1),
    ("norm_topk_prob", 1),
    ("compress_ratios", 4),
    ("compress_ratios", None),
    ("compress_ratios", [[4]] * 44),
    ("compress_ratios", ["4"] * 44),
    ("architectures", 1),
    ("dspark_block_size", "5"),
    ("dspark_target_layer_ids", 40),
    ("rope_scaling", 16),
    ("rope_scaling", [16]),
    ("quantization_config", "fp8"),
]
NESTED: list[tuple[str, str, Any]] = [
    ("rope_scaling", "type", "linear"),
    ("rope_scaling", "factor", 0.5),
    ("rope_scaling", "factor", "16"),
    ("rope_scaling", "factor", None),
    ("rope_scaling", "original_max_position_embeddings", 0),
    ("rope_scaling", "original_max_position_embeddings", "65536"),
    ("rope_scaling", "beta_fast", "32"),
    ("rope_scaling", "beta_slow", 0),
    ("quantization_config", "quant_method", "awq"),
]


def refused(field: str, value: Any, raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} = {caught.value.value!r}: ")
    if not isinstance(value, list):
        assert repr(caught.value.value) == repr(value)  # also for NaN


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_an_impossible_value_is_named(field: str, value: Any) -> None:
    refused(field, value, FLASH | {field: value})
    with pytest.raises(ConfigError):
        dataclasses.replace(preset("flash"), **{field: value})


@pytest.mark.parametrize(("field", "value"), MISTYPED)
def test_a_wrong_type_is_named(field: str, value: Any) -> None:
    refused(field, value, FLASH | {field: value})


@pytest.mark.parametrize(("field", "key", "value"), NESTED)
def test_a_wrong_nested_value_is_named(field: str, key: str, value: Any) -> None:
    refused(f"{field}.{key}", value, FLASH | {field: FLASH[field] | {key: value}})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "compress_ratios"])
def test_a_missing_key_is_named(key: str) -> None:
    refused(key, None, {name: value for name, value in FLASH.items() if name != key})


NEWER_WRONG: list[tuple[str, str, Any]] = [
    ("compress_ratios", "layer_types", ["full_attention"] * 43),
    ("layer_types", "layer_types", None),
    ("mlp_layer_types", "mlp_layer_types", 3),
    ("partial_rotary_factor", "partial_rotary_factor", "1/8"),
    ("rope_parameters.compress.rope_theta", "rope_parameters", {"compress": {"rope_type": "yarn"}}),
]


@pytest.mark.parametrize(("field", "key", "value"), NEWER_WRONG)
def test_a_wrong_newer_key_is_named(field: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(newer(FLASH) | {key: value})
    assert caught.value.field == field


def test_another_model_is_refused() -> None:
    refused("model_type", "deepseek_v3", FLASH | {"model_type": "deepseek_v3"})


def test_unknown_presets_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset = 'huge': known presets: flash, pro, tiny"):
        preset("huge")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json.*file not found"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"\xff\xfe{}"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config = .*config\.json.*not (a )?JSON") as caught:
        ModelConfig.load(tmp_path)
    assert caught.value.value == str(tmp_path / "config.json")


def test_parts_are_frozen() -> None:
    for part in (preset("tiny"), RopeScaling(), Quantization()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.extra = 1
