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
# Rows and bytes of the blocks that `ShuffledExperts` are cut in: 64 rows of 128 columns.
BLOCK = 64


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
class ShuffledExperts:
    """FP4 experts laid out for Hopper. w13: [E, ceil(2I/64), ceil(D/128), 4096] uint8, blocks of 64 rows and 128
    columns, each in one piece; w13_shifts: [E, ceil(D/128), rows] int32 and w13_scales: [E, ceil(D/128), rows]
    uint8, rows being 2I padded to 64; w2, w2_shifts and w2_scales likewise.

    A block is 64 stored rows of 64 bytes. Stored row 32r + 8w + a is row 16w + 8r + a. Its 32-bit word 4q + 2s + h
    has columns c..c+3 and 64+c..64+c+3, c = 32s + 16h + 4q, as selectors of a byte permutation. Bits 4j..4j+2:
    size of column c+j; bits 16+4j..: of column 64+c+j; bit 8j+7: sign of column c+j; bit 8j+3: of column 64+c+j.
    Scales are those of `lossless_fp8`. Byte g of a stored row's shift is 8 times the shift of its 32 columns g.
    """

    w13: Tensor
    w13_shifts: Tensor
    w13_scales: Tensor
    w2: Tensor
    w2_shifts: Tensor
    w2_scales: Tensor
    shared: Fp8Experts

    @property
    def shape(self) -> tuple[int, int, int]:
        """X (with the shared expert), D and I."""
        _, dim, inner = self.shared.shape
        return self.w2.shape[0] + 1, dim, inner

    @property
    def nbytes(self) -> int:
        parts = (self.w13, self.w13_shifts, self.w13_scales, self.w2, self.w2_shifts, self.w2_scales)
        return self.shared.nbytes + sum(t.nbytes for t in parts)


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


Experts = Fp8Experts | Fp4Experts | ShuffledExperts | FloatExperts


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

    Raises ValueError if one could not be e4m3 (`lossless_fp8`): most architectures multiply as such.
    """
    inner, dim = shared.w1.codes.shape
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


def shuffled(experts: Fp4Experts) -> ShuffledExperts:
    """The same weights laid out for Hopper, expert by expert.

    Raises ValueError if the scales of 128 columns of a row are more than 2^11 apart.
    """
    w13, w2 = (
        [torch.stack(part) for part in zip(*map(_blocks, codes, scales), strict=True)]
        for codes, scales in ((experts.w13, experts.w13_scales), (experts.w2, experts.w2_scales))
    )
    return ShuffledExperts(w13[0], w13[1], w13[2], w2[0], w2[1], w2[2], experts.shared)


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
    zeros = (unpacked(packed).unflatten(1, (-1, FP4_GROUP)) & 7).amax(2) == 0
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


def _blocks(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's matrix, [N, K/2] and [N, K/32] uint8 -> codes, shifts and scales of `ShuffledExperts`."""
    top, shift = _shifts(scale)
    if int(shift[:, : scale.shape[1]].min()) < 1 - LARGEST_SHIFT:
        raise ValueError("scales of 128 columns are more than 2^11 apart")
    rows, half = packed.shape
    pad = (0, -2 * half % GROUP, 0, -rows % BLOCK)
    codes = torch.nn.functional.pad(unpacked(packed), pad).long()
    # [blocks, w, r, a, chunks, half, sh, q, j] -> [blocks, chunks, r, w, a, q, sh, half, j]
    codes = codes.view(-1, 4, 2, 8, (2 * half + pad[1]) // GROUP, 2, 4, 4, 4).permute(0, 4, 2, 1, 3, 7, 6, 5, 8)
    low, high = codes.unbind(-2)
    j = torch.arange(4, device=packed.device)
    word = ((low & 7) << (4 * j)) | ((high & 7) << (16 + 4 * j)) | ((low >> 3) << (8 * j + 7))
    word = (word | ((high >> 3) << (8 * j + 3))).sum(-1)  # disjoint bits
    data = torch.stack([(word >> s) & 255 for s in (0, 8, 16, 24)], -1).to(torch.uint8)
    eighths = 8 * (shift.clamp_min(1 - LARGEST_SHIFT) + LARGEST_SHIFT).unflatten(1, (-1, GROUP // FP4_GROUP))
    word = (eighths << torch.arange(0, 32, 8, device=packed.device)).sum(2).int()
    shifts = torch.nn.functional.pad(word, (0, 0, 0, pad[3]))
    shifts = shifts.view(-1, 4, 2, 8, shifts.shape[1]).transpose(1, 2).flatten(0, 3)  # in the order of stored rows
    scales = torch.nn.functional.pad((top - LARGEST_SHIFT).clamp_min(0).to(torch.uint8), (0, 0, 0, pad[3]))
    return data.flatten(2), shifts.T.contiguous(), scales.T.contiguous()


def _alternate(out: Tensor, first: Tensor, second: Tensor) -> None:
    """Rows of two matrices in turn."""
    out[0::2], out[1::2] = first, second


def _moved(expert: StoredExpert, device: torch.device | str) -> StoredExpert:
    return StoredExpert(*(Matrix(*(t.to(device) for t in matrix)) for matrix in expert))
