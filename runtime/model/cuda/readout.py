"""From streams to the head's input, and the block that drafts."""

from __future__ import annotations

from torch import Tensor

from weft.kernels.gpu.hyper import hyper_head
from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.block import Block, Streams
from weft.runtime.model.cuda.linear import project
from weft.runtime.model.cuda.step import DeviceStep
from weft.runtime.model.cuda.weights import DeviceWeights


class Readout:
    """The head mixer, then the final norm."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.mixer = weights.head_mixer(config)
        self.norm = weights.wide("norm.weight")

    def __call__(self, h: Tensor) -> Tensor:
        """[n, hc, D] -> [n, D] in the dtype of h."""
        return hyper_head(h, self.mixer, self.norm)


class MtpBlock:
    """The multi-token-prediction layer: a window block over (streams at i, embedding of token i+1)."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.enorm = weights.wide("enorm.weight"), config.rms_norm_eps
        self.hnorm = weights.wide("hnorm.weight"), config.rms_norm_eps
        self.e_proj = weights.linear("e_proj.weight")
        self.h_proj = weights.linear("h_proj.weight")
        self.block = Block(config, weights, config.num_hidden_layers, "window", hashed=False)
        self.readout = Readout(config, weights)

    def __call__(self, h: Tensor, embedding: Tensor, step: DeviceStep) -> Tensor:
        """[T, hc, D], [T, D] -> [T, hc, D] in the dtype of h."""
        e = project(embedding, self.e_proj, norm=self.enorm)
        projected = project(h.flatten(0, 1), self.h_proj, norm=self.hnorm).view(h.shape)
        return self.block(Streams(e[:, None] + projected), step.ids, step).whole()
