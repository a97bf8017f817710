"""The trained tensors: the official ones, with the experts of a layer stacked, so that a step is few products.

`X.ffn.experts.w13` [E, 2, I, D] and `.w2` [E, D, I] stand for `X.ffn.experts.{e}.w{1,3,2}.weight`, and
`X.ffn.shared_experts.w13` [2, I, D] and `.w2` [D, I] for the shared one's. Everything else has its official name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from weft.runtime.checkpoint.layout import Weight, weights
from weft.runtime.config import ModelConfig
from weft.runtime.embedded.rounding import rounded

_EXPERT = re.compile(r"(.*\.ffn\.(?:shared_experts|experts))(?:\.(\d+))?\.w([123])\.weight")


def stack(config: ModelConfig, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors -> trained ones, float32 but for expert tables."""
    out: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for weight in weights(config):
        value = official[weight.name]
        value = value if weight.role == "expert_table" else value.float()
        match = _EXPERT.fullmatch(weight.name)
        if match:
            parts.setdefault(f"{match[1]}.w{match[3]}", []).append(value)
        else:
            out[weight.name] = value
    for name in [name for name in parts if name.endswith(".w1")]:
        group = name.removesuffix(".w1")
        w1, w2, w3 = (torch.stack(parts[f"{group}.w{i}"]) for i in (1, 2, 3))
        w13 = torch.stack((w1, w3), 1)
        shared = group.endswith("shared_experts")
        out[f"{group}.w13"] = w13[0] if shared else w13
        out[f"{group}.w2"] = w2[0] if shared else w2
    return out


def unstack(config: ModelConfig, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors -> official ones, views of them."""
    out = {}
    for weight in weights(config):
        match = _EXPERT.fullmatch(weight.name)
        if match is None:
            out[weight.name] = params[weight.name]
            continue
        group, expert, matrix = match.groups()
        stacked = params[f"{group}.w2" if matrix == "2" else f"{group}.w13"]
        own = stacked if expert is None else stacked[int(expert)]
        out[weight.name] = own if matrix == "2" else own[0 if matrix == "1" else 1]
    return out


def trained_weights(config: ModelConfig) -> dict[str, Weight]:
    """What each trained tensor is: the official weight that it is, or the first of those it stacks."""
    out: dict[str, Weight] = {}
    for weight in weights(config):
        match = _EXPERT.fullmatch(weight.name)
        name = f"{match[1]}.w{'2' if match[3] == '2' else '13'}" if match else weight.name
        out.setdefault(name, weight)
    return out


def as_shipped(config: ModelConfig, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the released formats keep them, with the gradients of those given."""
    kinds = trained_weights(config)
    return {name: rounded(value, kinds[name].storage) for name, value in params.items()}


def initial(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Untrained tensors: every stream is read and written, comb is near the identity, output layers are small."""
    generator = Generator().manual_seed(seed)
    return stack(config, {w.name: _first_value(config, w, generator) for w in weights(config)})


def _first_value(config: ModelConfig, weight: Weight, generator: Generator) -> Tensor:
    shape, role, name = weight.shape, weight.role, weight.name
    if role == "norm":
        return torch.ones(shape)
    if role in ("sink", "ape", "bias"):
        return torch.zeros(shape)
    if role == "hc_scale":
        return torch.full(shape, 0.1)
    if role == "expert_table":
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(1)
        return order[:, : shape[1]].contiguous()
    noise = torch.randn(shape, generator=generator)
    if role == "hc_base":
        return _first_base(config, noise)
    if role == "embed":
        return noise
    small = name.endswith(("wo_b.weight", "w2.weight"))
    return torch.mul(noise, (shape[-1] * (2 * config.num_hidden_layers if small else 1)) ** -0.5)


def _first_base(config: ModelConfig, noise: Tensor) -> Tensor:
    hc = config.hc_mult
    base = 0.5 * noise
    base[:hc] -= 1.0  # sigmoid near 1 / hc
    if len(base) > hc:
        base[2 * hc :] = 3.0 * torch.eye(hc).flatten() + 0.1 * noise[2 * hc :]
    return base
