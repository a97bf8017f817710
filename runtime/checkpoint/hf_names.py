"""Tensor names of Hugging Face checkpoints, and of files that mix them with the official ones.

transformers 5.23 has three spellings of one model: the `state_dict` of its modules
(`model.layers.3.self_attn.q_a_proj.weight`, experts merged into one tensor), the official names
behind a `model.` prefix, and what its own `save_pretrained` writes: a mixture, because it reverts the
renamings of single parts that loading made use of. A model loaded from official names is saved as
`model.embed_tokens` beside `head`, with `attn.norm` where both others say `kv_norm`; one loaded from
its own names as `attn.compressor.indexer.wkv`. `official_name` reads all of them.

`hf_name` is the spelling Weft writes: names of the modules, one matrix per expert as in the official
files, and `weight_scale_inv` beside a quantised matrix. That is what `from_pretrained` takes both on
a GPU, where it keeps FP8 and FP4, and on a CPU, where it dequantises; merged quantised experts would
only load on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from weft.runtime.checkpoint.layout import scale_name, weights
from weft.runtime.config import ModelConfig

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Below `layers.N.` and `model.layers.N.`; routed experts are handled apart.
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
GATE_UP = "gate_up_proj"  # [E, 2I, D]: the rows of w1, then those of w3
DOWN = "down_proj"  # [E, D, I]: w2

_OFFICIAL_TOP = {hf.removeprefix("model."): official for official, hf in _TOP.items()}


def _mixtures(official: str, hf: str) -> Iterator[str]:
    """Spellings of a name below its layer, whose first part is official."""
    hf = _official_module(hf)
    for folder, leaf in product((_parts(official)[0], _parts(hf)[0]), (_parts(official)[1], _parts(hf)[1])):
        yield folder + leaf


def _official_module(rest: str) -> str:
    return re.sub(r"^mlp\.", "ffn.", re.sub(r"^self_attn\.", "attn.", rest))


def _parts(name: str) -> tuple[str, str]:
    """`attn.indexer.` and `wq_b.weight`."""
    leaf = re.search(r"[^.]+(\.weight)?$", name)
    assert leaf is not None, name
    return name[: leaf.start()], leaf.group()


_OFFICIAL_LAYER = {name: official for official, hf in _LAYER.items() for name in _mixtures(official, hf)}
_OFFICIAL_LAYER["attn.norm.weight"] = "attn.kv_norm.weight"
_LAYER_NAME = re.compile(r"(layers\.\d+\.)(.+)")
_EXPERT_NAME = re.compile(r"ffn\.experts\.(.+)")


def official_name(name: str) -> str:
    """The official name of a stored tensor, or `name` without its `model.` prefix if not known.

    Merged experts have no official name: `layers.N.ffn.experts.gate_up_proj` and `.down_proj`.
    """
    name = name.removeprefix("model.")
    stem, _, leaf = name.rpartition(".")
    # `attn_hc.scale` belongs to a hyper-connection; the other scales go with a quantised matrix.
    if leaf in ("scale", "weight_scale_inv") and not stem.endswith("_hc"):
        return scale_name(_official_weight(f"{stem}.weight"))
    return _official_weight(name)


def _official_weight(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _OFFICIAL_TOP.get(name, name)
    layer, rest = match.group(1), _official_module(match.group(2))
    expert = _EXPERT_NAME.fullmatch(rest)
    if expert is None:
        return layer + _OFFICIAL_LAYER.get(rest, match.group(2))
    parts = expert.group(1).split(".")
    if len(parts) == 3:  # 7.gate_proj.weight
        parts[1] = _EXPERT.get(parts[1], parts[1])
    return f"{layer}ffn.experts.{'.'.join(parts)}"


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor stored under its official `name`; inverse of `official_name`.

    `mtp.*` keeps its name: transformers has no modules for it and passes over the prefix.
    """
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        assert name.startswith("mtp."), name
        return name
    layer, rest = match.groups()
    if rest.endswith(".scale"):
        return hf_name(f"{name.removesuffix('scale')}weight") + "_scale_inv"
    if rest.startswith("ffn.experts."):
        return f"model.{layer}mlp.{rest.removeprefix('ffn.')}"
    return f"model.{layer}{_LAYER[rest]}"


def merged_name(expert_weight: str) -> tuple[str, int] | None:
    """Merged tensor and expert index that hold an expert's matrix; None for any other weight.

    `layers.0.ffn.experts.7.w3.weight` -> (`layers.0.ffn.experts.gate_up_proj`, 7).
    """
    stem, found, rest = expert_weight.partition(".ffn.experts.")
    if not found:
        return None
    expert, matrix, _ = rest.split(".")
    return f"{stem}.ffn.experts.{DOWN if matrix == 'w2' else GATE_UP}", int(expert)


def to_hf_state_dict(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of transformers' DeepseekV4ForCausalLM with these weights, without MTP.

    `tensors` holds every dequantised weight of `config` under its official name. Experts are
    merged into new tensors, all others are shared with `tensors`.
    """
    out: dict[str, Tensor] = {}
    for weight in weights(config):
        match = _LAYER_NAME.fullmatch(weight.name)
        if weight.name in _TOP:
            out[_TOP[weight.name]] = tensors[weight.name]
        elif match is not None and match.group(2) in _LAYER:
            out[f"model.{match.group(1)}{_LAYER[match.group(2)]}"] = tensors[weight.name]
        else:
            assert weight.name.startswith("mtp.") or merged_name(weight.name), weight.name
    for layer in range(config.num_hidden_layers):
        stem = f"layers.{layer}.ffn.experts"
        experts = [f"{stem}.{expert}" for expert in range(config.n_routed_experts)]
        gate_up = [torch.cat([tensors[f"{name}.w1.weight"], tensors[f"{name}.w3.weight"]]) for name in experts]
        down = [tensors[f"{name}.w2.weight"] for name in experts]
        out[f"model.layers.{layer}.mlp.experts.{GATE_UP}"] = torch.stack(gate_up)
        out[f"model.layers.{layer}.mlp.experts.{DOWN}"] = torch.stack(down)
    return out
