"""One transformer block on device tensors: attention and experts, each behind its own hyper-connection mixer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft.kernels.gpu.hyper import Mixer, hyper_post, hyper_post_pre, hyper_pre
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.cuda.attention import Attention
from weft.runtime.model.cuda.ffn import MoE
from weft.runtime.model.cuda.step import DeviceStep
from weft.runtime.model.cuda.weights import DeviceWeights


@dataclass(frozen=True)
class Streams:
    """h: [T, hc, D]. A sublayer's output is spread over the streams in the launch that mixes them for the next
    one; until then it waits in `parts` [T, P, D], which add up to it, with the `mix` [T, hc * (2 + hc)] to spread
    it by."""

    h: Tensor
    parts: Tensor | None = None
    mix: Tensor | None = None

    def whole(self) -> Tensor:
        """[T, hc, D]."""
        if self.parts is None or self.mix is None:
            return self.h
        return hyper_post(self.h, self.parts, self.mix)

    def mixed(self, mixer: Mixer, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The streams with everything spread; a sublayer's input [T, D], normed; the mix for its output."""
        if self.parts is None or self.mix is None:
            x, mix = hyper_pre(self.h, mixer, norm)
            return self.h, x, mix
        return hyper_post_pre(self.h, self.parts, self.mix, mixer, norm)


class Block:
    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, layer: int, kind: LayerKind, *, hashed: bool
    ) -> None:
        self.attn_mixer = weights.mixer("hc_attn", config)
        self.attn_norm = weights.wide("attn_norm.weight")
        self.attn = Attention(config, weights.under("attn."), layer, kind)
        self.ffn_mixer = weights.mixer("hc_ffn", config)
        self.ffn_norm = weights.wide("ffn_norm.weight")
        self.ffn = MoE(config, weights.under("ffn."), hashed)

    def __call__(self, streams: Streams, ids: Tensor, step: DeviceStep) -> Streams:
        """Of T rows, in the model's dtype; ids: [T] int32 of these rows."""
        h, x, mix = streams.mixed(self.attn_mixer, self.attn_norm)
        streams = Streams(h, self.attn(x, step)[:, None], mix)
        h, x, mix = streams.mixed(self.ffn_mixer, self.ffn_norm)
        return Streams(h, self.ffn(x, ids), mix)
