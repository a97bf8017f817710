"""What follows attention: the rotation of its output back, and the FP8 quantisation for the next linear."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.reference import output as reference

GROUP = 128


def inverse_rope(o: Tensor, cos_sin: Tensor, *, implementation: str | None = None) -> Tensor:
    """Turn the last rope channels of o [T, H, d] back, by the rotation of the query's position.

    o: bfloat16 or float32, contiguous. cos_sin: [T, rope] float32. Returns a new tensor like o.
    """
    _check(o, cos_sin)
    if o.numel() == 0:
        return torch.empty_like(o)
    if (implementation or choose(arch(o), installed()).implementation) == "reference":
        return reference.inverse_rope(o, cos_sin)
    from weft.kernels.triton.output import inverse_rope as launch

    out = torch.empty_like(o)
    launch(o, cos_sin, out)
    return out


def inverse_rope_quant(
    o: Tensor, cos_sin: Tensor, group: int = GROUP, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """`inverse_rope`, quantised in groups of channels of the flattened heads.

    Returns codes [T, H * d] float8_e4m3fn and scales [T, H * d / group] float32, powers of two:
    2^ceil(log2(max(amax, 1e-4) / 448)), as the published code scales the inputs of FP8 linears.
    d and group: powers of two; group divides H * d.
    """
    _check(o, cos_sin)
    tokens, heads, dim = o.shape
    width = heads * dim
    check(group & (group - 1) == 0 and dim & (dim - 1) == 0 and width % group == 0, "group", group, o.shape)
    if tokens == 0:
        empty = torch.empty(0, width, dtype=torch.float8_e4m3fn, device=o.device)
        return empty, torch.empty(0, width // group, device=o.device)
    if (implementation or choose(arch(o), installed()).implementation) == "reference":
        return reference.inverse_rope_quant(o, cos_sin, group)
    from weft.kernels.triton.output import inverse_rope_quant as launch

    codes = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=o.device)
    scales = torch.empty(tokens, width // group, device=o.device)
    launch(o, cos_sin, group, codes, scales)
    return codes, scales


def choose(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("inverse_rope", arch, libraries)


def least_bytes(tokens: int, heads: int, dim: int, rope: int, itemsize: int, group: int | None) -> int:
    """o and the rotations read, the result written. group: of the quantised form, None for the other."""
    values = tokens * heads * dim
    written = itemsize * values if group is None else values + 4 * values // group
    return itemsize * values + 4 * tokens * rope + written


def _check(o: Tensor, cos_sin: Tensor) -> None:
    check_tensor("o", o, (None, None, None), torch.bfloat16, torch.float32)
    check_tensor("cos_sin", cos_sin, (o.shape[0], None), torch.float32)
    check(o.is_contiguous() and cos_sin.is_contiguous(), "o and cos_sin are contiguous")
    check(o.shape[2] % 2 == 0 and cos_sin.shape[1] <= o.shape[2], o.shape, cos_sin.shape)


OP = Op(
    "inverse_rope",
    "attention's output rotated back, or that and its FP8 quantisation in groups",
    ("reference", "triton"),
    (Example("any shape", choose),),
)
