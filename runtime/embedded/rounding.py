"""The released formats as roundings that let gradients through, so that a model trains in the numbers it ships in.

Each function gives the value that writing and reading the format gives (`weft.runtime.checkpoint.quant`,
`weft.kernels.quant`); its gradient is that of the identity. They run on any device and inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.quant import FP4_GROUP, FP4_MAX, FP8_GROUP, FP8_MAX
from weft.runtime.checkpoint.layout import FP8_BLOCK, Storage

_SMALLEST = 2.0**-120


def rounded(weight: Tensor, storage: Storage) -> Tensor:
    """A weight [..., O, I] as its storage keeps it; f32 and i64 unchanged."""
    how: dict[str, Callable[[Tensor], Tensor]] = {"bf16": _bf16, "fp8": _fp8_blocks, "fp4": fp4_groups}
    return through(weight, how[storage](weight.detach())) if storage in how else weight


def through(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of x."""
    return x + (value - x).detach()


def fp8_channels(x: Tensor, width: int) -> Tensor:
    """KV rows [..., d]: the first `width` channels in e4m3, scaled per 64 channels."""
    head, tail = x[..., :width], x[..., width:]
    parts = [_fp8(part, part.abs().amax(-1, keepdim=True).clamp_min(1e-4)) for part in head.split(FP8_GROUP, -1)]
    return torch.cat((*parts, tail), -1)


def fp4_groups(x: Tensor) -> Tensor:
    """[..., d] in e2m1, scaled per 32 channels."""
    width = x.shape[-1]
    padded = F.pad(x, (0, -width % min(FP4_GROUP, width)))
    group = padded.unflatten(-1, (-1, min(FP4_GROUP, width)))
    scale = _scale(group.abs().amax(-1, keepdim=True), FP4_MAX)
    return (_e2m1(group / scale) * scale).flatten(-2)[..., :width]


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _fp8_blocks(x: Tensor) -> Tensor:
    rows, columns = x.shape[-2:]
    padded = F.pad(x, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    out = _fp8(blocks, blocks.abs().amax((-3, -1), keepdim=True))
    return out.flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def _fp8(x: Tensor, top: Tensor) -> Tensor:
    scale = _scale(top, FP8_MAX)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _scale(top: Tensor, largest: float) -> Tensor:
    """The smallest power of two with top / scale <= largest."""
    return torch.exp2(torch.ceil(torch.log2(top.float().clamp_min(_SMALLEST) / largest)))


def _e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign, ties to even: steps of .5 below 2, 1 below 4, else 2."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((torch.round(size / step) * step).clamp_max(FP4_MAX), x)
