"""RoPE against complex128 rotation, YaRN against the published ramp."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from support.kernels import ROWS, U32, assert_rows_stand_alone, assert_within, on_tensors, same_bits
from weft.kernels import rope
from weft.kernels.rope import Rotation, inverse_frequencies

rotate_ = on_tensors(rope.rotate_)
YARN = {"factor": 16.0, "original_length": 65536, "beta_fast": 32.0, "beta_slow": 1.0}
POSITIONS = torch.tensor([0, 1, 2, 127, 128, 5000, 65535, 65536, 99_999, 1_048_575])
# (heads or 0 for none, rope_dim, channels that do not rotate)
SHAPES = [(0, 16, 48), (4, 16, 48), (0, 64, 448), (3, 64, 0), (1, 4, 2), (2, 6, 4), (0, 32, 0), (16, 16, 16)]


def exact_frequency(pair: int, rope_dim: int, theta: float) -> float:
    return theta ** (-2 * pair / rope_dim)


@pytest.mark.parametrize(("rope_dim", "theta"), [(64, 1e4), (64, 1.6e5), (16, 1e4), (2, 1e4), (6, 5.0)])
def test_plain_frequencies(rope_dim: int, theta: float) -> None:
    """The exponent's rounding moves the power by ln(theta) u; pow and the division add 4 u."""
    exact = torch.tensor([exact_frequency(i, rope_dim, theta) for i in range(rope_dim // 2)]).double()
    assert_within(inverse_frequencies(rope_dim, theta), exact, (math.log(theta) + 4) * U32 * exact)


def test_yarn_of_the_released_model() -> None:
    """rope_dim 64, theta 1.6e5: the ramp runs from floor(15.45) to ceil(24.71) (published model code)."""
    got = inverse_frequencies(64, 1.6e5, **YARN).double()
    plain = torch.tensor([exact_frequency(i, 64, 1.6e5) for i in range(32)]).double()
    share = [min(max((i - 15) / (25 - 15), 0.0), 1.0) for i in range(32)]
    exact = torch.stack([f / 16 * s + f * (1 - s) for f, s in zip(plain, share, strict=True)])
    assert_within(got, exact, (math.log(1.6e5) + 8) * U32 * exact)
    own = inverse_frequencies(64, 1.6e5).double()
    assert torch.equal(got[:16], own[:16]), "the fast pairs are not scaled"
    assert torch.equal(got[25:], own[25:] / 16), "the slow pairs are interpolated"
    assert bool(((got[16:25] < own[16:25]) & (got[16:25] > own[16:25] / 16)).all())


@pytest.mark.parametrize(("rope_dim", "theta", "length"), [(16, 1.6e5, 4096), (64, 1e4, 4096), (8, 100.0, 64)])
def test_yarn_ramp_of_other_shapes(rope_dim: int, theta: float, length: int) -> None:
    """A pair that turns more than beta_fast times over the length stays, one below beta_slow is interpolated."""
    scaling = YARN | {"original_length": length}
    ratio = inverse_frequencies(rope_dim, theta, **scaling) / inverse_frequencies(rope_dim, theta)
    turns = [length * exact_frequency(i, rope_dim, theta) / (2 * math.pi) for i in range(rope_dim // 2)]
    for pair, turned in enumerate(turns):
        if turned >= 32:
            assert float(ratio[pair]) == 1.0
        # The ramp ends at the next whole pair, which is up to one pair later.
        if turned <= theta ** (-2 / rope_dim):
            assert float(ratio[pair]) == pytest.approx(1 / 16, rel=1e-6)
    assert bool((ratio.diff() <= 1e-6).all())


def test_factor_one_is_plain() -> None:
    plain = inverse_frequencies(16, 1e4)
    assert same_bits(inverse_frequencies(16, 1e4, factor=1.0, original_length=64), plain)


def rotate_exactly(x: Tensor, angles: Tensor, rope_dim: int, sign: int) -> Tensor:
    """Pairs (2i, 2i+1) of the last rope_dim channels, one complex128 product at a time."""
    out = x.double().clone()
    flat = out.view(x.shape[0], -1, x.shape[-1])
    start = x.shape[-1] - rope_dim
    for t in range(flat.shape[0]):
        for h in range(flat.shape[1]):
            for i in range(rope_dim // 2):
                at = start + 2 * i
                turned = complex(flat[t, h, at], flat[t, h, at + 1]) * cmath.exp(1j * sign * float(angles[t, i]))
                flat[t, h, at], flat[t, h, at + 1] = turned.real, turned.imag
    return out


def rotation_bound(x: Tensor, angles: Tensor, rope_dim: int) -> Tensor:
    """The float32 angle is off by u times itself; cos and sin by 2 u more; two products and a sum add 3 u."""
    tail = x.double().unflatten(-1, (-1, 2)).abs().sum(-1)[..., -rope_dim // 2 :].repeat_interleave(2, dim=-1)
    error = ((angles + 5) * U32).repeat_interleave(2, dim=-1)
    error = error if x.dim() == 2 else error[:, None]
    bound = torch.zeros(x.shape, dtype=torch.float64)
    bound[..., -rope_dim:] = error * tail
    return bound


@pytest.mark.parametrize(("heads", "rope_dim", "rest"), SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_is_complex_multiplication(heads: int, rope_dim: int, rest: int, sign: int) -> None:
    shape = (len(POSITIONS), heads, rope_dim + rest) if heads else (len(POSITIONS), rope_dim + rest)
    x = torch.randn(shape)
    frequencies = inverse_frequencies(rope_dim, 1e4)
    angles = POSITIONS.double()[:, None] * frequencies.double()
    rotation = Rotation.at(POSITIONS, frequencies)
    got = rotate_(x.clone(), rotation if sign > 0 else rotation.inverse)
    assert_within(got, rotate_exactly(x, angles, rope_dim, sign), rotation_bound(x, angles, rope_dim))


def test_position_zero_changes_nothing() -> None:
    x = torch.randn(3, 2, 24)
    rotation = Rotation.at(torch.zeros(3, dtype=torch.int64), inverse_frequencies(16, 1e4))
    assert torch.equal(rotate_(x.clone(), rotation), x)


def test_rotation_is_in_place_and_returns_its_argument() -> None:
    x = torch.randn(10, 24)
    kept = x.clone()
    array = x.numpy()
    assert rope.rotate_(array, Rotation.at(POSITIONS, inverse_frequencies(16, 1e4))) is array
    assert torch.equal(x[:, :8], kept[:, :8])
    assert not torch.equal(x[1:, 8:], kept[1:, 8:])


@pytest.mark.parametrize(("heads", "rope_dim", "rest"), SHAPES)
def test_inverse_undoes_forward(heads: int, rope_dim: int, rest: int) -> None:
    """cos^2 + sin^2 is 1 within 5 u, and the two rotations round six times: 12 u of the pair's size."""
    shape = (len(POSITIONS), heads, rope_dim + rest) if heads else (len(POSITIONS), rope_dim + rest)
    x = torch.randn(shape)
    rotation = Rotation.at(POSITIONS, inverse_frequencies(rope_dim, 1e4))
    back = rotate_(rotate_(x.clone(), rotation), rotation.inverse)
    bound = rotation_bound(x, torch.full((len(POSITIONS), rope_dim // 2), 7.0), rope_dim)
    assert_within(back, x.double(), bound)


@pytest.mark.parametrize(("heads", "rope_dim", "rest"), SHAPES)
def test_rows_stand_alone(heads: int, rope_dim: int, rest: int) -> None:
    x = torch.randn((ROWS, heads, rope_dim + rest) if heads else (ROWS, rope_dim + rest))
    position = torch.randint(0, 1 << 20, (ROWS,))
    frequencies = inverse_frequencies(rope_dim, 1.6e5, **YARN)
    for inverse in (False, True):

        def run(x: Tensor, position: Tensor, inverse: bool = inverse) -> Tensor:
            rotation = Rotation.at(position, frequencies)
            return rotate_(x, rotation.inverse if inverse else rotation)

        assert_rows_stand_alone(run, x, position)


def test_a_head_rotates_as_it_would_alone() -> None:
    """q [T, H, d] and a KV row [T, d] of one position turn by the same bits."""
    x = torch.randn(10, 5, 64)
    rotation = Rotation.at(POSITIONS, inverse_frequencies(16, 1e4))
    whole = rotate_(x.clone(), rotation)
    for h in range(5):
        assert same_bits(rotate_(x[:, h].clone(), rotation), whole[:, h])


def test_no_rows() -> None:
    rotation = Rotation.at(torch.empty(0, dtype=torch.int64), inverse_frequencies(16, 1e4))
    assert rotate_(torch.empty(0, 20), rotation).shape == (0, 20)
    assert rotate_(torch.empty(0, 3, 20), rotation).shape == (0, 3, 20)
