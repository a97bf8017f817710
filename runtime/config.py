"""The shape of a DeepSeek-V4 model: every field of the published `config.json`, frozen and validated.

Field names and defaults are those of the published V4-Flash `config.json`; `pro` and `tiny` override them.
This module imports neither torch nor anything that does: the command line reads it at start.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from weft.runtime.config_hf import normalise
from weft.runtime.errors import ConfigError

LayerKind = Literal["window", "c4a", "c128a"]

C4 = 4
C128 = 128
KIND_OF_RATIO: dict[int, LayerKind] = {0: "window", C4: "c4a", C128: "c128a"}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters of the compressed layers (`rope_scaling` in config.json)."""

    type: str = "yarn"
    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Quantization:
    """Weight format of the released files (`quantization_config` in config.json)."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str = "ue8m0"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V4 model. Invalid values raise `ConfigError` naming field and value."""

    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)
    model_type: str = "deepseek_v4"
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.57.1"
    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    swiglu_limit: float = 10.0
    expert_dtype: str = "fp4"
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    tie_word_embeddings: bool = False
    use_cache: bool = True
    quantization_config: Quantization | None = Quantization()
    # V4-Flash-0731 only: its `mtp.*` tensors are DSpark draft stages, not the MTP block.
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] | None = None
    dspark_markov_rank: int | None = None
    # Keys of the source config.json that Weft does not know; they have no effect and `weft info` lists them.
    unknown_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        _check_values(self)

    # -- derived sizes ---------------------------------------------------------------------------------

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Attention kind of each backbone layer."""
        return tuple(KIND_OF_RATIO[r] for r in self.compress_ratios[: self.num_hidden_layers])

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint carries the MTP block (the 0731 refresh carries DSpark stages instead)."""
        return self.num_nextn_predict_layers > 0 and self.dspark_block_size is None

    @property
    def hc_mix_size(self) -> int:
        """Outputs of one hyper-connection mixer: hc pre, hc post, hc*hc comb."""
        return (2 + self.hc_mult) * self.hc_mult

    def is_hash_layer(self, layer: int) -> bool:
        return layer < self.num_hash_layers

    def count(self, kind: LayerKind) -> int:
        return self.layer_kinds.count(kind)

    # -- reading and writing ---------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json mapping: the published keys, or the newer ones transformers writes."""
        if raw.get("model_type", "deepseek_v4") != "deepseek_v4":
            raise ConfigError("model_type", raw["model_type"], "only deepseek_v4 is served")
        values, unknown = {}, []
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in normalise(raw).items():
            if key in names:
                values[key] = value
            else:
                unknown.append(key)
        for key in ("hidden_size", "num_hidden_layers", "compress_ratios"):
            if key not in values:
                raise ConfigError(key, None, "missing")
        values["rope_scaling"] = _nested(RopeScaling, "rope_scaling", values.get("rope_scaling"))
        values["quantization_config"] = _nested(
            Quantization, "quantization_config", values.get("quantization_config")
        )
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = tuple(value)
        return cls(**values, unknown_keys=tuple(sorted(unknown)))

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read `path`/config.json (or the file itself)."""
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError("config", str(file), "file not found") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError("config", str(file), f"not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError("config", str(file), "not a JSON object")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The published config.json form."""
        raw = dataclasses.asdict(self)
        del raw["unknown_keys"]
        return {key: value for key, value in raw.items() if value is not None}


def _nested(cls: type[Any], field: str, value: Any) -> Any:
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(field, value, "must be an object")
    names = {f.name for f in dataclasses.fields(cls)}
    picked = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in names}
    return cls(**picked)


def _check_types(part: Any, prefix: str = "") -> None:
    """Also of the nested parts; JSON's integers will do for floats."""
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        if isinstance(value, RopeScaling | Quantization):
            _check_types(value, f"{name}.")
            continue
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            raise ConfigError(prefix + name, value, str(error)) from None


def _check_values(c: ModelConfig) -> None:
    positive = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank "
        "o_lora_rank o_groups sliding_window index_n_heads index_head_dim index_topk n_routed_experts "
        "num_experts_per_tok moe_intermediate_size hc_mult hc_sinkhorn_iters max_position_embeddings "
        "rope_theta compress_rope_theta rms_norm_eps hc_eps swiglu_limit"
    )
    for name in positive.split():
        _require(getattr(c, name) > 0, name, getattr(c, name), "must be positive")
    only = {
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    for name, value in only.items():
        _require(getattr(c, name) == value, name, getattr(c, name), f"DeepSeek-V4 has {value!r}")
    ratios = c.compress_ratios
    _require(len(ratios) >= c.num_hidden_layers, "compress_ratios", ratios, "fewer entries than layers")
    _require(set(ratios) <= set(KIND_OF_RATIO), "compress_ratios", ratios, "entries must be 0, 4 or 128")
    _require(
        not any(ratios[c.num_hidden_layers :]),
        "compress_ratios",
        ratios,
        "entries after the backbone must be 0",
    )
    _require(c.head_dim % 4 == 0, "head_dim", c.head_dim, "must be a multiple of 4 (aligned KV rows)")
    rope = c.qk_rope_head_dim
    _require(rope % 2 == 0 and rope >= 4, "qk_rope_head_dim", rope, "must be even and at least 4")
    _require(rope <= c.head_dim, "qk_rope_head_dim", rope, f"must not exceed head_dim {c.head_dim}")
    _require(rope <= c.index_head_dim, "qk_rope_head_dim", rope, f"exceeds index_head_dim {c.index_head_dim}")
    power = c.index_head_dim & (c.index_head_dim - 1) == 0
    _require(power, "index_head_dim", c.index_head_dim, "must be a power of two (Hadamard)")
    _require(
        c.num_attention_heads * c.head_dim % c.o_groups == 0,
        "o_groups",
        c.o_groups,
        "must divide num_attention_heads * head_dim",
    )
    experts = c.num_experts_per_tok
    _require(experts <= c.n_routed_experts, "num_experts_per_tok", experts, "exceeds n_routed_experts")
    _require(c.num_hash_layers >= 0, "num_hash_layers", c.num_hash_layers, "must not be negative")
    _require(c.expert_dtype in ("fp4", "fp8"), "expert_dtype", c.expert_dtype, "must be fp4 or fp8")
    _require(c.num_nextn_predict_layers >= 0, "num_nextn_predict_layers", c.num_nextn_predict_layers, "negative")
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(c, name)
        _require(0 <= token < c.vocab_size, name, token, f"not in a vocabulary of {c.vocab_size}")
    if c.rope_scaling is not None:
        _require(c.rope_scaling.type == "yarn", "rope_scaling.type", c.rope_scaling.type, "must be yarn")
        _require(c.rope_scaling.factor >= 1, "rope_scaling.factor", c.rope_scaling.factor, "must be at least 1")
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(c.rope_scaling, name)
            _require(value > 0, f"rope_scaling.{name}", value, "must be positive")
    if c.quantization_config is not None:
        method = c.quantization_config.quant_method
        _require(method == "fp8", "quantization_config.quant_method", method, "must be fp8")


def _require(ok: bool, field: str, value: object, reason: str) -> None:
    if not ok:
        raise ConfigError(field, value, reason)


_FLASH = ModelConfig()
PRESETS: dict[str, ModelConfig] = {
    "flash": _FLASH,
    "pro": dataclasses.replace(
        _FLASH,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        index_topk=1024,
        compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    ),
    # Every feature in 2.4 M parameters: all three layer kinds, hash and gated experts, an MTP block.
    "tiny": dataclasses.replace(
        _FLASH,
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=48,
        o_lora_rank=24,
        o_groups=2,
        sliding_window=32,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
        index_n_heads=16,
        index_head_dim=32,
        index_topk=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        swiglu_limit=1.0,
        rope_scaling=RopeScaling(original_max_position_embeddings=4096),
        max_position_embeddings=65536,
    ),
}


def preset(name: str) -> ModelConfig:
    """A named config; `ConfigError` lists the names when it is unknown."""
    if name not in PRESETS:
        raise ConfigError("preset", name, f"known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
