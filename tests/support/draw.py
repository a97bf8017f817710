"""Random weights and random shapes, lively enough that a forgotten term shows in the logits."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from weft.runtime.config import C4, C128, ModelConfig, RopeScaling, preset

# -- random weights --------------------------------------------------------------------------------


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Lively float32 weights under the official names, with `mtp.0.*` if the config has it.

    Nothing is near zero or one, so that a forgotten term shows: norms, sinks, position biases, gate
    biases and all hyper-connection parts are random. Activations and logits have a standard
    deviation near one.
    """
    draw = Draw(config, seed)
    draw.backbone()
    for layer in range(config.num_hidden_layers):
        draw.experts(f"layers.{layer}.ffn")
    if config.has_mtp:
        draw.mtp()
        draw.experts("mtp.0.ffn")
    return draw.weights


class Draw:
    """Draws weights by their role, from one generator."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.weights: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self.weights[name] = self.randn(*shape) * std + mean

    def linear(self, name: str, out: int, fan_in: int) -> None:
        self.normal(f"{name}.weight", out, fan_in, std=fan_in**-0.5)

    def norm(self, name: str, size: int) -> None:
        self.normal(f"{name}.weight", size, std=0.1, mean=1.0)

    def mixer(self, name: str, outputs: int, scales: int) -> None:
        """`name` ends where fn, base and scale are appended."""
        fan_in = self.config.hc_mult * self.config.hidden_size
        self.normal(f"{name}fn", outputs, fan_in, std=fan_in**-0.5)
        self.normal(f"{name}base", outputs, std=0.3)
        self.weights[f"{name}scale"] = 0.5 + 0.2 * torch.rand(scales, generator=self._generator)

    def head(self, name: str) -> None:
        self.norm(f"{name}norm", self.config.hidden_size)
        self.mixer(f"{name}hc_head_", self.config.hc_mult, 1)

    def backbone(self) -> None:
        """All but the routed experts."""
        c = self.config
        self.normal("embed.weight", c.vocab_size, c.hidden_size, std=1.0)
        self.linear("head", c.vocab_size, c.hidden_size)
        self.head("")
        for layer in range(c.num_hidden_layers):
            self.block(f"layers.{layer}", c.compress_ratios[layer], hashed=layer < c.num_hash_layers)

    def mtp(self) -> None:
        """All of the MTP block but its routed experts."""
        width = self.config.hidden_size
        self.block("mtp.0", 0, hashed=False)
        for projection, norm in (("e_proj", "enorm"), ("h_proj", "hnorm")):
            self.linear(f"mtp.0.{projection}", width, width)
            self.norm(f"mtp.0.{norm}", width)
        self.head("mtp.0.")

    def block(self, name: str, ratio: int, *, hashed: bool) -> None:
        """All of a layer but its routed experts."""
        for sub in ("attn", "ffn"):
            self.norm(f"{name}.{sub}_norm", self.config.hidden_size)
            self.mixer(f"{name}.hc_{sub}_", self.config.hc_mix_size, 3)
        self.attention(f"{name}.attn", ratio)
        self.router(f"{name}.ffn.gate", hashed=hashed)
        self.expert(f"{name}.ffn.shared_experts")

    def attention(self, name: str, ratio: int) -> None:
        c = self.config
        heads_width = c.num_attention_heads * c.head_dim
        self.normal(f"{name}.attn_sink", c.num_attention_heads, std=1.0)
        self.linear(f"{name}.wq_a", c.q_lora_rank, c.hidden_size)
        self.norm(f"{name}.q_norm", c.q_lora_rank)
        self.linear(f"{name}.wq_b", heads_width, c.q_lora_rank)
        self.linear(f"{name}.wkv", c.head_dim, c.hidden_size)
        self.norm(f"{name}.kv_norm", c.head_dim)
        self.linear(f"{name}.wo_a", c.o_groups * c.o_lora_rank, heads_width // c.o_groups)
        self.linear(f"{name}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        if ratio:
            self.compressor(f"{name}.compressor", ratio, c.head_dim)
        if ratio == C4:
            self.compressor(f"{name}.indexer.compressor", ratio, c.index_head_dim)
            self.linear(f"{name}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            self.linear(f"{name}.indexer.weights_proj", c.index_n_heads, c.hidden_size)

    def compressor(self, name: str, ratio: int, width: int) -> None:
        channels = 2 * width if ratio == C4 else width
        self.normal(f"{name}.ape", ratio, channels, std=0.5)
        self.linear(f"{name}.wkv", channels, self.config.hidden_size)
        self.linear(f"{name}.wgate", channels, self.config.hidden_size)
        self.norm(f"{name}.norm", width)

    def router(self, name: str, *, hashed: bool) -> None:
        c = self.config
        self.linear(name, c.n_routed_experts, c.hidden_size)
        if hashed:
            order = self.randn(c.vocab_size, c.n_routed_experts)
            self.weights[f"{name}.tid2eid"] = order.topk(c.num_experts_per_tok).indices
        else:
            self.normal(f"{name}.bias", c.n_routed_experts, std=0.05)

    def experts(self, name: str) -> None:
        for expert in range(self.config.n_routed_experts):
            self.expert(f"{name}.experts.{expert}")

    def expert(self, name: str) -> None:
        width, inner = self.config.hidden_size, self.config.moe_intermediate_size
        self.linear(f"{name}.w1", inner, width)
        self.linear(f"{name}.w2", width, inner)
        self.linear(f"{name}.w3", inner, width)


# -- random shapes ---------------------------------------------------------------------------------


def random_config(seed: int) -> ModelConfig:
    """A small config with every shape drawn; even seeds have both kinds of compressed layer."""
    draw = random.Random(seed)
    layers = draw.randint(3, 7)
    ratios = [draw.choice((0, C4, C128)) for _ in range(layers)]
    if seed % 2 == 0:
        for place, ratio in zip(draw.sample(range(layers), 2), (C4, C128), strict=True):
            ratios[place] = ratio
    config = dataclasses.replace(
        preset("tiny"),
        vocab_size=draw.randint(97, 512),
        num_hidden_layers=layers,
        compress_ratios=(*ratios, 0),
        num_hash_layers=draw.randint(0, 3),
        n_routed_experts=draw.randint(4, 12),
        num_experts_per_tok=draw.randint(1, 4),
        routed_scaling_factor=draw.choice((1.0, 1.5, 2.5)),
        swiglu_limit=draw.uniform(1, 10),
        sliding_window=draw.choice((32, 128)),
        rope_scaling=_random_scaling(draw),
        # Far from the published 1e-6 and 20 rounds, where neither shows in the logits.
        hc_sinkhorn_iters=draw.choice((2, 3, 20)),
        hc_eps=draw.choice((1e-6, 1e-2)),
        rms_norm_eps=draw.choice((1e-6, 1e-2)),
    )
    return _random_widths(draw, config)


def _random_widths(draw: random.Random, config: ModelConfig) -> ModelConfig:
    heads, rope = draw.choice((2, 4, 8)), draw.choice((8, 16))
    return dataclasses.replace(
        config,
        hidden_size=draw.choice((64, 80, 96, 100, 128, 136, 160)),
        num_attention_heads=heads,
        head_dim=draw.choice((32, 48, 64)),
        qk_rope_head_dim=rope,
        q_lora_rank=draw.choice((24, 32, 48, 56)),
        o_lora_rank=draw.choice((8, 16, 24, 40)),
        o_groups=draw.choice([groups for groups in (1, 2, 4, 8) if heads % groups == 0]),
        index_n_heads=draw.choice((16, 32)),
        index_head_dim=draw.choice((16, 32, 64)),
        index_topk=draw.choice((4, 8, 16, 300)),  # 1000 tokens make 250 entries
        moe_intermediate_size=draw.choice((32, 48, 64, 72)),
    )


def _random_scaling(draw: random.Random) -> RopeScaling | None:
    """None, or YaRN with the ramp inside the pairs or beyond one end, by the original length."""
    if draw.random() < 0.3:
        return None
    return RopeScaling(
        factor=draw.choice((2.0, 4.0, 16.0)),
        original_max_position_embeddings=draw.choice((128, 1024, 4096, 65536)),
    )
