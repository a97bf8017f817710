"""Weights of a layer's experts as their kernels read them, and how they are made from the released tensors.

Rows of w13 alternate between w1 and w3 (row 2i is w1's row i, row 2i+1 is w3's), so that whatever rows a tile has,
it has both halves of a gated channel. FP8 scales are per row and 128 columns, as in `weft.kernels.gpu.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.quant import FP4_VALUES

GROUP = 128
FP4_GROUP = 32
# e2m1 times 2^k is an e4m3 number for these k, the largest of a group of 128 columns being put at the top.
LARGEST_SHIFT, LEAST_SHIFT = 6, -8


class Matrix(NamedTuple):
    """A matrix as released. codes: [N, K] float8_e4m3fn with scale [ceil(N/128), ceil(K/128)], or [N, K/2] int8 of
    two e2m1 codes, the even column in the low nibble, with scale [N, K/32]; scales float8_e8m0fnu."""

    codes: Tensor
    scale: Tensor


class StoredExpert(NamedTuple):
    """w1, w3: [I, D]; w2: [D, I]."""

    w1: Matrix
    w2: Matrix
    w3: Matrix


@dataclass(frozen=True)
class Fp8Experts:
    """w13: [X, 2I, D] float8_e4m3fn, w13_scales: [X, ceil(D/128), 2I] uint8 (E8M0); w2: [X, D, I], w2_scales:
    [X, ceil(I/128), D]. The shared expert is the last of the X."""

    w13: Tensor
    w13_scales: Tensor
    w2: Tensor
    w2_scales: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """X, D and I."""
        count, dim, inner = self.w2.shape
        return count, dim, inner

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.w13, self.w13_scales, self.w2, self.w2_scales))

    @classmethod
    def empty(cls, count: int, dim: int, inner: int, device: torch.device | str) -> Fp8Experts:
        w13 = _bytes(count, 2 * inner, dim, device=device)
        w2 = _bytes(count, dim, inner, device=device)
        return cls(
            w13.view(torch.float8_e4m3fn),
            _bytes(count, -(-dim // GROUP), 2 * inner, device=device),
            w2.view(torch.float8_e4m3fn),
            _bytes(count, -(-inner // GROUP), dim, device=device),
        )

    def put(self, number: int, expert: StoredExpert) -> None:
        """Expert `number`, from FP8 or FP4. Raises ValueError as `lossless_fp8` does."""
        w1, w2, w3 = (rows_fp8(*matrix) for matrix in expert)
        _alternate(self.w13[number], w1[0], w3[0])
        _alternate(self.w13_scales[number].T, w1[1].T, w3[1].T)
        self.w2[number], self.w2_scales[number] = w2


@dataclass(frozen=True)
class Fp4Experts:
    """Routed experts as released: w13 [E, 2I, D/2] uint8, the even column in the low nibble, w13_scales
    [E, 2I, D/32] uint8 (E8M0), w2 and w2_scales likewise. shared: the one FP8 expert beside them."""

    w13: Tensor
    w13_scales: Tensor
    w2: Tensor
    w2_scales: Tensor
    shared: Fp8Experts

    @property
    def shape(self) -> tuple[int, int, int]:
        """X (with the shared expert), D and I."""
        count, dim, half = self.w2.shape
        return count + 1, dim, 2 * half

    @property
    def nbytes(self) -> int:
        return self.shared.nbytes + sum(t.nbytes for t in (self.w13, self.w13_scales, self.w2, self.w2_scales))


@dataclass(frozen=True)
class FloatExperts:
    """w13: [X, 2I, D], w2: [X, D, I], bfloat16 or float32. The shared expert is the last."""

    w13: Tensor
    w2: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """X, D and I."""
        count, dim, inner = self.w2.shape
        return count, dim, inner

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes


Experts = Fp8Experts | Fp4Experts | FloatExperts


def fp8_experts(
    routed: Iterable[StoredExpert], count: int, shared: StoredExpert, device: torch.device | str
) -> Fp8Experts:
    """`count` routed experts, FP4 or FP8, and the shared one. Raises ValueError as `lossless_fp8` does."""
    inner, dim = shared.w1.codes.shape
    out = Fp8Experts.empty(count + 1, dim, inner, device)
    for number, expert in enumerate(routed):
        out.put(number, _moved(expert, device))
    out.put(count, _moved(shared, device))
    return out


def fp4_experts(
    routed: Iterable[StoredExpert], count: int, shared: StoredExpert, device: torch.device | str
) -> Fp4Experts:
    """`count` routed experts in FP4, kept as they are but for the order of rows, and the shared one in FP8.

    Raises ValueError if one could not be e4m3 (`lossless_fp8`): most architectures multiply as such; and for sizes
    that are no multiples of 32.
    """
    inner, dim = shared.w1.codes.shape
    if dim % FP4_GROUP or inner % FP4_GROUP:
        raise ValueError(f"FP4 experts of {inner} x {dim}: no multiples of {FP4_GROUP}; they can be held as FP8")
    one = Fp8Experts.empty(1, dim, inner, device)
    one.put(0, _moved(shared, device))
    out = Fp4Experts(
        _bytes(count, 2 * inner, dim // 2, device=device),
        _bytes(count, 2 * inner, dim // FP4_GROUP, device=device),
        _bytes(count, dim, inner // 2, device=device),
        _bytes(count, dim, inner // FP4_GROUP, device=device),
        one,
    )
    for number, expert in enumerate(routed):
        w1, w2, w3 = (Matrix(m.codes.view(torch.uint8), usable(*m)) for m in _moved(expert, device))
        _alternate(out.w13[number], w1.codes, w3.codes)
        _alternate(out.w13_scales[number], w1.scale, w3.scale)
        out.w2[number], out.w2_scales[number] = w2
    return out


def float_experts(w1: Tensor, w2: Tensor, w3: Tensor) -> FloatExperts:
    """w1, w3: [X, I, D], w2: [X, D, I], the shared expert last."""
    return FloatExperts(torch.stack((w1, w3), 2).flatten(1, 2), w2.contiguous())


def lossless_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1 [N, K/2] with E8M0 scales [N, K/32] -> the same values as e4m3 [N, K], E8M0 uint8 [ceil(K/128), N].

    The largest scale of 128 columns gets the shift 2^6, and 2^14 fit between it and the least one (groups of
    zeros aside). Raises ValueError where they do not.
    """
    top, shift = _shifts(usable(packed, scale))
    codes = unpacked(packed)
    table = _e4m3_table(packed.device)
    lifted = shift.repeat_interleave(FP4_GROUP, 1)[:, : codes.shape[1]] - LEAST_SHIFT
    out = table[(lifted * 16 + codes).long()]
    return out.view(torch.float8_e4m3fn), (top - LARGEST_SHIFT).clamp_min(0).to(torch.uint8).T.contiguous()


def rows_fp8(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A released matrix, FP8 or FP4 -> e4m3 [N, K] and E8M0 uint8 [ceil(K/128), N]."""
    if codes.dtype == torch.float8_e4m3fn:
        rows = scale.view(torch.uint8).repeat_interleave(GROUP, 0)[: len(codes)]
        return codes, rows.T.contiguous()
    return lossless_fp8(codes, scale)


def unpacked(packed: Tensor) -> Tensor:
    """[N, K/2] bytes -> [N, K] codes 0..15, int32, the low nibble first."""
    byte = packed.view(torch.uint8).int()
    return torch.stack((byte & 15, byte >> 4), -1).flatten(-2)


def usable(packed: Tensor, scale: Tensor) -> Tensor:
    """Scales [N, K/32] uint8 where groups of zeros have the largest scale of their 128 columns.

    Raises ValueError where the others are too far apart, or too small, for `lossless_fp8`.
    """
    scales = scale.view(torch.uint8).int()
    codes = unpacked(packed)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % FP4_GROUP))
    zeros = (codes.unflatten(1, (-1, FP4_GROUP)) & 7).amax(2) == 0
    top = _of_chunks(torch.where(zeros, 0, scales)).amax(2)
    every = top.repeat_interleave(GROUP // FP4_GROUP, 1)[:, : scales.shape[1]]
    apart = torch.where(zeros, 0, every - scales)
    if int(apart.max()) > LARGEST_SHIFT - LEAST_SHIFT:
        raise ValueError(f"scales of 128 columns are up to 2^{int(apart.max())} apart; e4m3 holds 2^14")
    if bool(((every < LARGEST_SHIFT) & ~zeros).any()):
        raise ValueError("scales below 2^-121 cannot be lowered any more")
    return torch.where(zeros, every, scales).to(torch.uint8)


def _bytes(*shape: int, device: torch.device | str) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _of_chunks(scales: Tensor) -> Tensor:
    """[N, K/32] -> [N, ceil(K/128), 4]; what is missing of the last four is 0."""
    width = GROUP // FP4_GROUP
    padded: Tensor = torch.nn.functional.pad(scales, (0, -scales.shape[1] % width)).unflatten(1, (-1, width))
    return padded


def _shifts(scales: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K/32] uint8 -> the largest of four [N, ceil(K/128)], and the k of each group [N, 4 * ceil(K/128)]."""
    chunks = _of_chunks(scales.int())
    top = chunks.amax(2)
    return top, (chunks - top[:, :, None] + LARGEST_SHIFT).clamp_min(LEAST_SHIFT).flatten(1)


def _e4m3_table(device: torch.device) -> Tensor:
    """[15 * 16] uint8: e4m3 codes of e2m1 code c times 2^(LEAST_SHIFT + i), at 16 i + c."""
    values = torch.tensor(FP4_VALUES)
    shifts = 2.0 ** torch.arange(LEAST_SHIFT, LARGEST_SHIFT + 1)
    table = torch.cat((values, -values))[None, :] * shifts[:, None]
    return table.to(torch.float8_e4m3fn).view(torch.uint8).flatten().to(device)


def _alternate(out: Tensor, first: Tensor, second: Tensor) -> None:
    """Rows of two matrices in turn."""
    out[0::2], out[1::2] = first, second


def _moved(expert: StoredExpert, device: torch.device | str) -> StoredExpert:
    return StoredExpert(*(Matrix(*(t.to(device) for t in matrix)) for matrix in expert))
