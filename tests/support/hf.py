"""transformers' DeepSeek-V4 as an oracle, with random weights and random shapes to run it on.

transformers has no MTP block; `hf_mtp` builds one from its layer modules. Everything runs in
float32 with eager attention and eager experts. Names in `Weights` are those of the released files
(see `reference`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from support.draw import Draw
from support.draw import random_config as random_config
from support.draw import random_weights as random_weights
from support.reference import Weights
from weft.runtime.config import C4, C128, LayerKind, ModelConfig, preset

# -- the transformers model ------------------------------------------------------------------------

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_ATTENTION = {
    "attn_sink": "sinks",
    "wq_a.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_norm.weight",
    "wq_b.weight": "q_b_proj.weight",
    "wkv.weight": "kv_proj.weight",
    "kv_norm.weight": "kv_norm.weight",
    "wo_a.weight": "o_a_proj.weight",
    "wo_b.weight": "o_b_proj.weight",
    "indexer.wq_b.weight": "compressor.indexer.q_b_proj.weight",
    "indexer.weights_proj.weight": "compressor.indexer.scorer.weights_proj.weight",
}
_COMPRESSOR = {
    "wkv.weight": "kv_proj.weight",
    "wgate.weight": "gate_proj.weight",
    "norm.weight": "kv_norm.weight",
    "ape": "position_bias",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    **{f"hc_{sub}_{part}": f"{sub}_hc.{part}" for sub in ("attn", "ffn") for part in ("fn", "base", "scale")},
    **{f"attn.{name}": f"self_attn.{theirs}" for name, theirs in _ATTENTION.items()},
    **{f"attn.compressor.{name}": f"self_attn.compressor.{theirs}" for name, theirs in _COMPRESSOR.items()},
    **{
        f"attn.indexer.compressor.{name}": f"self_attn.compressor.indexer.{theirs}"
        for name, theirs in _COMPRESSOR.items()
    },
}
_HC_HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale")
_EXPERT = re.compile(r"ffn\.experts\.\d+\.w[123]\.weight")


def hf_config(config: ModelConfig) -> DeepseekV4Config:
    """transformers' config for an unquantised float32 model with eager attention and experts."""
    raw = config.to_dict() | {"torch_dtype": "float32"}
    raw.pop("quantization_config", None)
    with _without_yarn_warning():
        out = DeepseekV4Config(**raw)
    out._attn_implementation = "eager"
    out._experts_implementation = "eager"
    return out


def hf_model(config: ModelConfig, weights: Weights) -> DeepseekV4ForCausalLM:
    """The backbone in float32, eval mode. It shares float32 weights, except the experts."""
    experts = {
        layer: _stack_experts(weights, f"layers.{layer}", config.n_routed_experts)
        for layer in range(config.num_hidden_layers)
    }
    return _assemble(config, weights, experts)


def hf_logits(model: DeepseekV4ForCausalLM, ids: list[int] | Tensor) -> Tensor:
    """Logits [S, V] of every position, no cache."""
    with torch.inference_mode():
        out = model(torch.as_tensor(ids, dtype=torch.int64)[None], use_cache=False)
    logits: Tensor = out.logits[0].clone()
    return logits


def hf_streams(model: DeepseekV4ForCausalLM, ids: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """(streams [S, hc, D] after the last layer, logits [S, V]), no cache."""
    seen: list[Tensor] = []
    last = model.model.layers[-1]
    handle = last.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    try:
        logits = hf_logits(model, ids)
    finally:
        handle.remove()
    return seen[0].clone(), logits


def hf_greedy(model: DeepseekV4ForCausalLM, ids: list[int], steps: int) -> list[int]:
    """The `steps` most likely next tokens, with transformers' own cache; EOS does not stop it."""
    picked: list[int] = []
    feed, cache = torch.tensor([ids]), None
    with torch.inference_mode():
        while len(picked) < steps:
            out = model(feed, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            picked.append(int(out.logits[0, -1].argmax()))
            feed = torch.tensor([picked[-1:]])
    return picked


def hf_mtp(
    config: ModelConfig, weights: Weights, streams: Tensor, next_ids: list[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """The MTP block out of transformers modules, from position 0: (streams, logits [n, V]).

    streams: [n, hc, D]; next_ids: [n]. A sliding-window decoder layer with top-k experts between
    the two input projections and a second hyper-head; built anew at each call.
    """
    one = dataclasses.replace(config, num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0)
    moved = {
        **{f"layers.0.{key[6:]}": value for key, value in weights.items() if key.startswith("mtp.0.")},
        **{key: weights[key] for key in ("embed.weight", "head.weight")},
        **{key: weights[f"mtp.0.{key}"] for key in ("norm.weight", *_HC_HEAD)},
    }
    model = hf_model(one, {key: value for key, value in moved.items() if _known(key)})
    with torch.inference_mode():
        return _run_mtp(one, model, weights, streams.float()[None], torch.as_tensor(next_ids)[None])


def _run_mtp(
    config: ModelConfig,
    model: DeepseekV4ForCausalLM,
    weights: Weights,
    streams: Tensor,
    next_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """streams [1, n, hc, D], next_ids [1, n] -> (streams, logits) without the batch."""
    body = model.model
    embedded = _norm(config, weights["mtp.0.enorm.weight"])(body.embed_tokens(next_ids))
    token = torch.nn.functional.linear(embedded, weights["mtp.0.e_proj.weight"].float())
    normed = _norm(config, weights["mtp.0.hnorm.weight"])(streams)
    hidden = torch.nn.functional.linear(normed, weights["mtp.0.h_proj.weight"].float())
    positions = torch.arange(next_ids.shape[1])[None]
    mask = create_sliding_window_causal_mask(
        config=body.config,
        inputs_embeds=token,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    out = body.layers[0](
        token[:, :, None] + hidden,
        position_embeddings={
            kind: body.rotary_emb(token, position_ids=positions, layer_type=kind) for kind in ("main", "compress")
        },
        position_ids=positions,
        attention_mask=mask,
        input_ids=next_ids,
        past_key_values=None,
    )
    return out[0].clone(), model.lm_head(body.norm(body.hc_head(out)))[0].clone()


def _norm(config: ModelConfig, weight: Tensor) -> torch.nn.Module:
    module = modeling.DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    module.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    return module


def _assemble(
    config: ModelConfig, weights: Weights, experts: dict[int, tuple[Tensor, Tensor]]
) -> DeepseekV4ForCausalLM:
    """Build on the meta device, then put the tensors in: nothing is allocated twice."""
    shape = hf_config(config)
    with _without_yarn_warning(), torch.device("meta"):
        model = DeepseekV4ForCausalLM(shape)
    _restore_rotary(model, shape)
    state = {_hf_name(name): _plain(value) for name, value in weights.items() if _is_dense(name)}
    for layer, (gate_up, down) in experts.items():
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not left, f"no value for {left}"
    model.requires_grad_(False)
    model.train(False)
    return model


def _restore_rotary(model: DeepseekV4ForCausalLM, config: DeepseekV4Config) -> None:
    """Frequencies are computed, not loaded: those of the meta device are replaced by real ones."""
    rotary = modeling.DeepseekV4RotaryEmbedding(config)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, modeling.DeepseekV4RotaryEmbedding):
                setattr(parent, name, rotary)


def _plain(value: Tensor) -> Tensor:
    return value if value.dtype == torch.int64 else value.float()


def _is_dense(name: str) -> bool:
    """Neither a routed expert, which transformers stacks, nor of the MTP block, which it lacks."""
    return not name.startswith("mtp.") and _EXPERT.search(name) is None


def _known(name: str) -> bool:
    return _EXPERT.search(name) is not None or name in _TOP or name.split(".", 2)[-1] in _LAYER


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}"


def _stack_experts(weights: Weights, layer: str, experts: int) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, D], the rows of w1 before those of w3, and down [E, D, I]."""

    def stack(which: str) -> Tensor:
        return torch.stack([weights[f"{layer}.ffn.experts.{e}.{which}.weight"].float() for e in range(experts)])

    return torch.cat([stack("w1"), stack("w3")], dim=1), stack("w2")


@contextlib.contextmanager
def _without_yarn_warning() -> Iterator[None]:
    """Drop one log line: the small configs pair any original length with any factor."""

    def keep(record: logging.LogRecord) -> bool:
        return "RoPE scaling factor" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_rope_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


# -- one layer at the width of V4-Flash ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FullWidth:
    """A V4-Flash layer whose routed experts overlap in memory.

    Expert e reads rows e .. e + 2I of one buffer [E + 2I, D] as its w1 and w3, and rows e .. e + D
    of another [E + D, I] as its w2: each differs from its neighbours by a shift, and all 256 take
    0.1 GB instead of 25.

    weights: by official name, the experts being views. gate_up [E, 2I, D] and down [E, D, I]: the
    same memory as one overlapping stack, as transformers holds it. Never write to them, never call
    contiguous().
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    gate_up: Tensor
    down: Tensor
    model: DeepseekV4ForCausalLM


def full_width_layer(kind: LayerKind, *, hashed: bool = False, index_topk: int = 512, seed: int = 0) -> FullWidth:
    """One layer with every width of V4-Flash, 256 experts and a vocabulary of 256; no MTP block.

    `hashed` routes by token id. A c4a layer selects among entries only past 4 * index_topk tokens,
    so short tests of the selection lower `index_topk`.
    """
    config = dataclasses.replace(
        preset("flash"),
        vocab_size=256,
        num_hidden_layers=1,
        compress_ratios=({"window": 0, "c4a": C4, "c128a": C128}[kind], 0),
        num_hash_layers=int(hashed),
        num_nextn_predict_layers=0,
        index_topk=index_topk,
    )
    draw = Draw(config, seed)
    draw.backbone()
    gate_up, down = _overlapping_experts(config, draw)
    model = _assemble(config, draw.weights, {0: (gate_up, down)})
    weights = draw.weights | _expert_views(config, gate_up, down)
    return FullWidth(config, weights, gate_up, down, model)


def _overlapping_experts(config: ModelConfig, draw: Draw) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, D] and down [E, D, I] with expert stride of one row."""
    experts, width = config.n_routed_experts, config.hidden_size
    inner = config.moe_intermediate_size
    rows = draw.randn(experts + 2 * inner, width) * width**-0.5
    columns = draw.randn(experts + width, inner) * inner**-0.5
    gate_up = rows.as_strided((experts, 2 * inner, width), (width, width, 1))
    return gate_up, columns.as_strided((experts, width, inner), (inner, inner, 1))


def _expert_views(config: ModelConfig, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    inner, views = config.moe_intermediate_size, {}
    for expert in range(config.n_routed_experts):
        name = f"layers.0.ffn.experts.{expert}"
        views[f"{name}.w1.weight"] = gate_up[expert, :inner]
        views[f"{name}.w2.weight"] = down[expert]
        views[f"{name}.w3.weight"] = gate_up[expert, inner:]
    return views
