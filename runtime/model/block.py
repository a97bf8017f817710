"""One transformer block: attention and experts, each behind its own hyper-connection mixer."""

from __future__ import annotations

import torch

from weft.kernels.hyper import Mixer, gather_streams, spread_streams
from weft.kernels.linear import Array, Index
from weft.kernels.norm import rms_norm
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.attention import Attention
from weft.runtime.model.context import StepContext
from weft.runtime.model.ffn import MoE
from weft.runtime.model.weights import Weights


class Block:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        kind: LayerKind,
        *,
        hashed: bool,
        quant_sim: bool,
    ) -> None:
        self.eps = config.rms_norm_eps
        self.dtype = weights.dtype
        self.attn_mixer = _mixer(config, weights, "hc_attn")
        self.attn_norm = weights.array("attn_norm.weight")
        self.attn = Attention(config, weights.under("attn."), layer, kind, quant_sim)
        self.ffn_mixer = _mixer(config, weights, "hc_ffn")
        self.ffn_norm = weights.array("ffn_norm.weight")
        self.ffn = MoE(config, weights.under("ffn."), hashed)

    def __call__(self, h: Array, ids: Index, step: StepContext) -> Array:
        """h: [T, hc, D] -> [T, hc, D], values of the model's dtype in float32."""
        mix = self.attn_mixer(h)
        x = rounded(rms_norm(gather_streams(h, mix.pre), self.attn_norm, self.eps), self.dtype)
        h = rounded(spread_streams(h, self.attn(x, step), mix), self.dtype)
        mix = self.ffn_mixer(h)
        x = rounded(rms_norm(gather_streams(h, mix.pre), self.ffn_norm, self.eps), self.dtype)
        return rounded(spread_streams(h, self.ffn(x, ids), mix), self.dtype)


def rounded(x: Array, dtype: torch.dtype) -> Array:
    """The nearest values of `dtype`."""
    if dtype == torch.float32:
        return x
    out: Array = torch.from_numpy(x).to(dtype).float().numpy()
    return out


def _mixer(config: ModelConfig, weights: Weights, name: str) -> Mixer:
    return Mixer(
        weights.wide_linear(f"{name}_fn"),
        weights.wide(f"{name}_base"),
        weights.wide(f"{name}_scale"),
        streams=config.hc_mult,
        iterations=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
    )
