"""The CPU model with the activations of its FP8 and FP4 linears rounded, as a device's kernels round them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weft.kernels.linear import Array, Linear
from weft.kernels.moe import Expert
from weft.kernels.quant import FP8_MAX, power_of_two_at_least
from weft.runtime.model.block import Block
from weft.runtime.model.compressor import C4Compressor
from weft.runtime.model.model import Model

GROUP = 128


def rounded(x: Tensor) -> Tensor:
    """[T, K] float32 rounded to e4m3, a power of two as scale per row and 128 columns."""
    out = []
    for group in x.split(GROUP, 1):
        scale = power_of_two_at_least(group.abs().amax(1, keepdim=True).clamp_min(1e-4) / FP8_MAX)
        out.append((group / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(out, 1)


class Rounded:
    """A linear behind rounded inputs."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def array(self, x: Array) -> Array:
        return self._linear.array(rounded(torch.from_numpy(x)).numpy())

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(rounded(x.float()))


def round_activations(model: Model) -> Model:
    """Changes the model: what a checkpoint stores as FP8 or FP4 gets rounded inputs."""
    wrap: Callable[[Linear], Linear] = Rounded  # type: ignore[assignment]
    blocks = list(model.blocks)
    if model.mtp is not None:
        model.mtp.e_proj, model.mtp.h_proj = wrap(model.mtp.e_proj), wrap(model.mtp.h_proj)
        blocks.append(model.mtp.block)
    for block in blocks:
        _round_block(block, wrap)
    return model


def _round_block(block: Block, wrap: Callable[[Linear], Linear]) -> None:
    attn, ffn = block.attn, block.ffn
    attn.wq_a_kv, attn.wq_b, attn.wo_b = wrap(attn.wq_a_kv), wrap(attn.wq_b), wrap(attn.wo_b)
    attn.wo_a = [wrap(part) for part in attn.wo_a]
    if isinstance(attn.compressor, C4Compressor):
        attn.compressor.wq_b = wrap(attn.compressor.wq_b)
    ffn.experts = [Expert(wrap(expert.w13), wrap(expert.w2)) for expert in ffn.experts]
    ffn.shared = Expert(wrap(ffn.shared.w13), wrap(ffn.shared.w2))
