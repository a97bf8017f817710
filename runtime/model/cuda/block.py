"""One transformer block on device tensors: attention and experts, each behind its own hyper-connection mixer."""

from __future__ import annotations

from torch import Tensor

from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.cuda.attention import Attention
from weft.runtime.model.cuda.ffn import MoE
from weft.runtime.model.cuda.hyper import Mixer, gather_streams, rms_norm, spread_streams
from weft.runtime.model.cuda.step import DeviceStep
from weft.runtime.model.cuda.weights import DeviceWeights


class Block:
    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, layer: int, kind: LayerKind, *, hashed: bool
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attn_mixer = Mixer(config, weights, "hc_attn")
        self.attn_norm = weights.wide("attn_norm.weight")
        self.attn = Attention(config, weights.under("attn."), layer, kind)
        self.ffn_mixer = Mixer(config, weights, "hc_ffn")
        self.ffn_norm = weights.wide("ffn_norm.weight")
        self.ffn = MoE(config, weights.under("ffn."), hashed)

    def __call__(self, h: Tensor, ids: Tensor, step: DeviceStep) -> Tensor:
        """h: [T, hc, D] -> [T, hc, D], in the model's dtype; ids: [T] of these rows."""
        mix = self.attn_mixer(h)
        x = rms_norm(gather_streams(h, mix.pre), self.attn_norm, self.eps).to(h.dtype)
        h = spread_streams(h, self.attn(x, step), mix)
        mix = self.ffn_mixer(h)
        x = rms_norm(gather_streams(h, mix.pre), self.ffn_norm, self.eps).to(h.dtype)
        return spread_streams(h, self.ffn(x, ids), mix)
