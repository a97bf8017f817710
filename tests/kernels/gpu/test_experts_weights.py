"""Experts' weights from released tensors: values are kept exactly, and FP4 multiplies as the FP8 made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernels import same_bits
from weft.kernels.gpu.expert_weights import (
    Matrix,
    StoredExpert,
    float_experts,
    fp4_experts,
    fp8_experts,
    lossless_fp8,
    unpacked,
)
from weft.kernels.gpu.experts import run_experts
from weft.kernels.quant import e2m1_values
from weft.kernels.reference import experts as reference

DIM, INNER, EXPERTS = 160, 96, 3


def fp4_matrix(rows: int, columns: int, spread: int = 4) -> Matrix:
    packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
    scale = torch.randint(120, 121 + spread, (rows, -(-columns // 32)), dtype=torch.uint8)
    return Matrix(packed, scale.view(torch.float8_e8m0fnu))


def fp8_matrix(rows: int, columns: int) -> Matrix:
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 124, (-(-rows // 128), -(-columns // 128)), dtype=torch.uint8)
    return Matrix(codes, scale.view(torch.float8_e8m0fnu))


def expert(make: Any) -> StoredExpert:
    return StoredExpert(make(INNER, DIM), make(DIM, INNER), make(INNER, DIM))


def values(matrix: Matrix) -> Tensor:
    """By the format's definition, float64."""
    scale = matrix.scale.float().double()
    if matrix.codes.dtype == torch.int8:
        codes = e2m1_values(unpacked(matrix.codes)).double()
        return codes * scale.repeat_interleave(32, 1)[:, : codes.shape[1]]
    rows, columns = matrix.codes.shape
    return matrix.codes.double() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def alternating(expert: StoredExpert) -> Tensor:
    return torch.stack((values(expert.w1), values(expert.w3)), 1).flatten(0, 1)


def test_every_code_at_every_shift_is_kept() -> None:
    """Four groups in a row of 128: the largest scale, and three others up to 2^14 below it."""
    codes = torch.arange(16, dtype=torch.uint8)
    group = (codes | codes.flip(0) << 4).view(torch.int8)
    for below in range(15):
        packed = group.repeat(1, 4)
        scale = torch.tensor([[130, 130 - below, 130 - below // 2, 130]], dtype=torch.uint8)
        matrix = Matrix(packed, scale.view(torch.float8_e8m0fnu))
        made, scales = lossless_fp8(*matrix)
        assert torch.equal(made.double() * 2.0 ** (scales.T.double() - 127), values(matrix))
        assert scales.tolist() == [[124]]


def test_scales_too_far_apart_are_refused() -> None:
    packed = torch.full((2, 64), 0x11, dtype=torch.int8)
    scale = torch.tensor([[130] * 4, [130, 115, 130, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match=r"2\^15 apart"):
        lossless_fp8(packed, scale)
    packed[1, 16:32] = -128  # zeros of both signs have no scale to keep
    made, _ = lossless_fp8(packed, scale)
    assert not made[1, 32:64].float().any() and bool(made[0].float().all())
    tiny = torch.tensor([[5] * 4] * 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="below"):
        lossless_fp8(packed, tiny)


@pytest.mark.parametrize("columns", [16, 48, 144])
def test_groups_that_are_cut_off(columns: int) -> None:
    matrix = fp4_matrix(3, columns)
    made, scales = lossless_fp8(*matrix)
    every = scales.T.repeat_interleave(128, 1)[:, :columns].double()
    assert torch.equal(made.double() * 2.0 ** (every - 127), values(matrix))
    narrow = StoredExpert(fp4_matrix(16, 64), fp4_matrix(64, 16), fp4_matrix(16, 64))
    with pytest.raises(ValueError, match="multiples of 32"):
        fp4_experts([narrow], 1, StoredExpert(fp8_matrix(16, 64), fp8_matrix(64, 16), fp8_matrix(16, 64)), "cpu")


def test_all_layouts_hold_the_released_values() -> None:
    routed, shared = [expert(fp4_matrix) for _ in range(EXPERTS)], expert(fp8_matrix)
    packed = fp4_experts(routed, EXPERTS, shared, "cpu")
    for made in (fp8_experts(routed, EXPERTS, shared, "cpu"), packed):
        assert made.shape == (EXPERTS + 1, DIM, INNER)
        for number, stored in enumerate([*routed, shared]):
            assert torch.equal(reference.matrix(made, number, "w13"), alternating(stored))
            assert torch.equal(reference.matrix(made, number, "w2"), values(stored.w2))


def test_fp8_and_float_experts_hold_the_released_values() -> None:
    routed = [expert(fp8_matrix) for _ in range(EXPERTS)]
    made = fp8_experts(routed[:-1], EXPERTS - 1, routed[-1], "cpu")
    w1, w2, w3 = (torch.stack([values(part).float() for part in parts]) for parts in zip(*routed, strict=True))
    plain = float_experts(w1, w2, w3)
    for number, stored in enumerate(routed):
        for each in (made, plain):
            assert torch.equal(reference.matrix(each, number, "w13"), alternating(stored))
            assert torch.equal(reference.matrix(each, number, "w2"), values(stored.w2))


def moved(experts: Any, device: str) -> Any:
    parts = {
        name: moved(part, device) if name == "shared" else part.to(device) for name, part in vars(experts).items()
    }
    return type(experts)(**parts)


def test_fp4_multiplies_as_the_fp8_made_of_it(device: str) -> None:
    """Bit for bit; scales up to 2^11 apart."""
    routed = [expert(lambda n, k: fp4_matrix(n, k, spread=11)) for _ in range(EXPERTS)]
    shared = expert(fp8_matrix)
    packed = fp4_experts(routed, EXPERTS, shared, "cpu")
    ids, weights = reference.random_routes(4, EXPERTS, 2, device)
    x = torch.randn(4, DIM, device=device).bfloat16()
    want = run_experts(x, ids, weights, moved(fp8_experts(routed, EXPERTS, shared, "cpu"), device), 10.0)
    assert bool(torch.isfinite(want).all()) and want.abs().max() > 1.0
    assert same_bits(run_experts(x, ids, weights, moved(packed, device), 10.0), want)
