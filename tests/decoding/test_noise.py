"""Noise against a SplitMix64 written in Python integers, its distribution, and its independence of the batch."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from support.kernels import same_bits
from weft.runtime.decoding.noise import SAMPLE, gumbel, stream_key

WIDTHS = [1, 3, 265, 512, 513, 4099]
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def finalise(x: int) -> int:
    x = (x ^ x >> 30) * MULTIPLIERS[0] & MASK
    x = (x ^ x >> 27) * MULTIPLIERS[1] & MASK
    return x ^ x >> 31


def unfinalise(x: int) -> int:
    """The inverse: which counter gives the output x."""
    x = undo_shift(x, 31) * pow(MULTIPLIERS[1], -1, 1 << 64) & MASK
    x = undo_shift(x, 27) * pow(MULTIPLIERS[0], -1, 1 << 64) & MASK
    return undo_shift(x, 30)


def undo_shift(x: int, bits: int) -> int:
    y = x
    for _ in range(64 // bits):
        y = x ^ y >> bits
    return y


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def keys_of(count: int) -> Tensor:
    return torch.tensor([stream_key(7, position) for position in range(count)])


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_values_are_those_of_splitmix64(key: int) -> None:
    """Token i takes the generator's output number i + 1; its upper bits make the uniform number."""
    got = gumbel(torch.tensor([key]), 300)[0].tolist()
    for i, value in enumerate(got):
        output = finalise((key + (i + 1) * GOLDEN) & MASK)
        uniform = ((output >> 11) + 0.5) * 2.0**-53
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_the_same_alone_and_together(width: int) -> None:
    keys = keys_of(40)
    together = gumbel(keys, width)
    assert together.shape == (40, width)
    assert together.dtype == torch.float64
    for i in range(40):
        assert same_bits(gumbel(keys[i : i + 1], width)[0], together[i])
    for start, stop in ((0, 2), (1, 4), (3, 10), (5, 38)):
        assert same_bits(gumbel(keys[start:stop], width), together[start:stop])
    order = torch.randperm(40)
    assert same_bits(gumbel(keys[order], width), together[order])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_keeps_its_noise_in_a_larger_vocabulary(width: int) -> None:
    keys = keys_of(5)
    wide = gumbel(keys, 5000)
    assert same_bits(gumbel(keys, width), wide[:, :width])


def test_streams_differ() -> None:
    """By seed, position and purpose, each of them, whichever way they are paired."""
    numbers = [0, 1, 2, 3, 2**31, 2**63 - 1, -1]
    triples = [(seed, position, purpose) for seed in numbers for position in numbers for purpose in numbers]
    drawn = random.sample(range(1 << 32), 3000)
    triples += [(seed, position, SAMPLE) for seed, position in pairwise(drawn)]
    keys = {stream_key(*triple) for triple in triples}
    assert len(keys) == len(set(triples))
    assert all(-(2**63) <= key < 2**63 for key in keys)
    rows = gumbel(torch.tensor(sorted(keys)[:300]), 8)
    assert len({tuple(row) for row in rows.tolist()}) == 300


@pytest.mark.parametrize("triple", [(0, 0, 0), (7, 1, 0), (1, 7, 0), (-3, 2**40, 5), (2**64 - 3, 2**40, 5)])
def test_keys_stay_what_they_are(triple: tuple[int, int, int]) -> None:
    """A seed that a user wrote down draws the same tokens in the next version."""
    key = 0
    for number in triple:
        key = finalise(((key ^ number) + GOLDEN) & MASK)
    assert stream_key(*triple) == signed(key)


def test_the_purpose_of_sampling_is_the_default() -> None:
    assert stream_key(5, 9) == stream_key(5, 9, SAMPLE)


def kolmogorov(sample: Tensor) -> float:
    """Largest distance to the Gumbel distribution exp(-exp(-x)), times sqrt(n)."""
    n = sample.numel()
    level = torch.exp(-torch.exp(-sample.flatten().sort().values))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((level - steps[:-1]).max(), (steps[1:] - level).max())) * math.sqrt(n)


@pytest.mark.parametrize(("rows", "width"), [(1, 200_000), (200_000, 1), (400, 500)])
def test_distribution_is_gumbel(rows: int, width: int) -> None:
    """Within one row, across positions, and both: 2.7 is exceeded by one honest sample in a million."""
    assert kolmogorov(gumbel(keys_of(rows), width)) < 2.7


@pytest.mark.parametrize("shift", [0, 1])
def test_uniform_bits(shift: int) -> None:
    """Chi-square over 256 equal cells, the next ones included: mean 255, deviation 22.6; 255 + 6 of them."""
    uniform = torch.exp(-torch.exp(-gumbel(keys_of(20), 10_000)))
    cells = (uniform * (256 << 8 * shift)).long() & 255
    count = torch.bincount(cells.flatten(), minlength=256).double()
    mean = cells.numel() / 256
    assert float(((count - mean) ** 2 / mean).sum()) < 255 + 6 * math.sqrt(510)


def test_neighbouring_rows_are_uncorrelated() -> None:
    """Successive positions, seeds and purposes: a correlation of 200,000 pairs has deviation 0.0022."""
    pairs = [((7, p), (7, p + 1)) for p in range(20)]
    pairs += [((p, 7), (p + 1, 7)) for p in range(20)]
    pairs += [((7, p, 0), (7, p, 1)) for p in range(20)]
    for kind in (pairs[:20], pairs[20:40], pairs[40:]):
        left, right = (gumbel(torch.tensor([stream_key(*one[i]) for one in kind]), 10_000) for i in (0, 1))
        correlation = torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1]
        assert abs(float(correlation)) < 6 * 0.0022


@pytest.mark.parametrize("output", [0, 1, MASK, MASK - 1, 1 << 63, MASK << 11 & MASK])
def test_every_output_gives_finite_noise(output: int) -> None:
    """Infinite noise would draw a token whatever its probability, and a forbidden one as NaN."""
    counter = unfinalise(output)
    assert finalise(counter) == output
    noise = gumbel(torch.tensor([signed((counter - GOLDEN) & MASK)]), 1)
    assert math.isfinite(noise.item())


def test_no_rows() -> None:
    assert gumbel(torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)
