"""Translate the config.json keys that newer transformers releases write into the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.runtime.errors import ConfigError

_RATIO_OF_TYPE = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
# Written by transformers for every model or derived from other fields: known, and without effect here.
_NOISE = frozenset(
    [
        "compress_rates",
        "layer_types",
        "mlp_layer_types",
        "rope_parameters",
        "partial_rotary_factor",
        "dtype",
        "pad_token_id",
        "mlp_bias",
        "default_theta",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "_name_or_path",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
    ]
)


def normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Published keys win; missing ones are derived from the newer spelling."""
    for key, kind in (("layer_types", list), ("mlp_layer_types", list), ("partial_rotary_factor", float)):
        if key in raw and not isinstance(raw[key], kind):
            raise ConfigError(key, raw[key], f"must be {kind.__name__}")
    out = {key: value for key, value in raw.items() if key not in _NOISE}
    if "compress_ratios" not in raw and "layer_types" in raw:
        ratios = [_RATIO_OF_TYPE.get(kind, kind) for kind in raw["layer_types"]]
        out["compress_ratios"] = [*ratios, 0]
    if "num_hash_layers" not in raw and "mlp_layer_types" in raw:
        out["num_hash_layers"] = sum(kind == "hash_moe" for kind in raw["mlp_layer_types"])
    if "qk_rope_head_dim" not in raw and "partial_rotary_factor" in raw:
        out["qk_rope_head_dim"] = round(raw["head_dim"] * raw["partial_rotary_factor"])
    rope = raw.get("rope_parameters")
    if "rope_scaling" not in raw and isinstance(rope, Mapping):
        out |= _from_rope_parameters(rope)
    if "torch_dtype" not in raw and isinstance(raw.get("dtype"), str):
        out["torch_dtype"] = raw["dtype"]
    return out


def _from_rope_parameters(rope: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    main, compress = rope.get("main"), rope.get("compress")
    if isinstance(main, Mapping) and "rope_theta" in main:
        out["rope_theta"] = main["rope_theta"]
    if isinstance(compress, Mapping):
        if "rope_theta" not in compress:
            raise ConfigError("rope_parameters.compress.rope_theta", None, "missing")
        out["compress_rope_theta"] = compress["rope_theta"]
        if compress.get("rope_type") == "yarn":
            out["rope_scaling"] = {**compress, "type": "yarn"}
        else:
            out["rope_scaling"] = None
    return out
