"""The float64 reference against transformers, and against its own definitions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from support.hf import hf_logits, hf_model, hf_mtp, hf_streams, random_config, random_weights
from support.reference import (
    Reference,
    Weights,
    e2m1_grid,
    e4m3_grid,
    hadamard,
    reference_forward,
    reference_mtp,
    reference_mtp_with_margins,
    round_to_grid,
    simulate_index_fp4,
    simulate_kv_fp8,
    tainted_rows,
)
from weft.runtime.config import ModelConfig, preset

NEAR_TIE = 2e-5  # float32 moves index scores by up to 7e-6 and gate scores by up to 1e-6 here
NEAR_ROUNDING = 3e-7  # values flip up to about 1e-7 from a boundary
TOLERANCE = 1e-4
# Around the window (32), the compressed windows (4, 128) and the first c4a selection (8 entries).
LENGTHS = [*range(1, 10), *range(31, 38), *range(63, 66), *range(127, 133), *range(255, 258), 300]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_weights() -> Weights:
    return random_weights(preset("tiny"), seed=0)


def random_ids(config: ModelConfig, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator)


def worst(expected: Reference, streams: Tensor, logits: Tensor) -> float:
    """Largest error of either output over the rows that no near-tie can have changed."""
    clean = ~tainted_rows(expected.margins, NEAR_TIE)
    assert clean.any()
    errors = [(streams - expected.streams)[clean], (logits - expected.logits)[clean]]
    return max(error.abs().max().item() for error in errors)


# -- the backbone ----------------------------------------------------------------------------------


def test_agrees_with_transformers_at_every_kind_of_length(tiny_weights: Weights) -> None:
    config = preset("tiny")
    model = hf_model(config, tiny_weights)
    ids = random_ids(config, max(LENGTHS), seed=0)
    for length in LENGTHS:
        expected = reference_forward(config, tiny_weights, ids[:length])
        assert worst(expected, *hf_streams(model, ids[:length])) < TOLERANCE, length


@pytest.mark.parametrize("seed", range(16))
def test_agrees_with_transformers_on_random_shapes(seed: int) -> None:
    config = random_config(seed)
    weights = random_weights(config, seed)
    model = hf_model(config, weights)
    ids = random_ids(config, 300, seed)
    for length in (1, 6, 129, 257, 300):
        expected = reference_forward(config, weights, ids[:length])
        assert worst(expected, *hf_streams(model, ids[:length])) < TOLERANCE, length


def test_logits_have_unit_scale(tiny_weights: Weights) -> None:
    config = preset("tiny")
    logits = reference_forward(config, tiny_weights, random_ids(config, 64, seed=1)).logits
    assert 0.8 < logits.std() < 1.25


# -- margins ---------------------------------------------------------------------------------------


def hashed(index_topk: int) -> ModelConfig:
    """A c4a, a window and a c128a layer, all routed by token id."""
    return dataclasses.replace(
        preset("tiny"),
        num_hidden_layers=3,
        compress_ratios=(4, 0, 128, 0),
        num_hash_layers=3,
        index_topk=index_topk,
    )


def test_no_choice_has_no_margin() -> None:
    config = hashed(50)
    margins = reference_forward(config, random_weights(config, 0), random_ids(config, 200, 0)).margins
    assert margins.isinf().all()


def test_index_margin_starts_with_the_first_rejected_entry() -> None:
    config = hashed(4)
    margins = reference_forward(config, random_weights(config, 0), random_ids(config, 60, 0)).margins
    assert margins[:19].isinf().all()
    assert margins[19:].isfinite().all()  # token 19 completes the fifth entry


def test_gate_margin_is_the_gap_after_the_last_picked_expert() -> None:
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    weights = random_weights(config, 0)
    # With gates of zero all scores are sqrt(log 2) and the bias alone decides.
    weights["layers.0.ffn.gate.weight"].zero_()
    weights["layers.0.ffn.gate.bias"] = torch.tensor([0.0, 8, 1, 7, 2, 4, 3, 3.5])
    margins = reference_forward(config, weights, random_ids(config, 5, 0)).margins
    torch.testing.assert_close(margins, torch.full((5,), 0.5, dtype=torch.float64))


def test_taint_reaches_every_later_row() -> None:
    margins = torch.tensor([math.inf, 1.0, 1e-7, math.inf, 1.0], dtype=torch.float64)
    assert tainted_rows(margins, 1e-6).tolist() == [False, False, True, True, True]
    assert not tainted_rows(margins, 1e-8).any()


# -- the MTP block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_mtp_agrees_with_transformers_modules(seed: int) -> None:
    config = random_config(seed)
    weights = random_weights(config, seed)
    ids = random_ids(config, 151, seed)
    streams = reference_forward(config, weights, ids[:-1]).streams
    expected = reference_mtp_with_margins(config, weights, streams, ids[1:], torch.arange(150))
    assert worst(expected, *hf_mtp(config, weights, streams, ids[1:])) < TOLERANCE


def test_mtp_rows_see_one_window_of_earlier_rows(tiny_weights: Weights) -> None:
    config = preset("tiny")
    streams = torch.randn(100, config.hc_mult, config.hidden_size, generator=torch.Generator().manual_seed(0))
    next_ids = random_ids(config, 100, seed=2)
    positions = torch.arange(100)

    def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(start, stop)
        return reference_mtp(config, tiny_weights, streams[rows], next_ids[rows], positions[rows])

    full = part(0, 100)
    for stop in (1, 2, 31, 32, 33, 64, 99):
        for whole, short in zip(full, part(0, stop), strict=True):
            torch.testing.assert_close(short, whole[:stop])
    before = config.sliding_window - 1
    for start in (40, 67):
        for whole, late in zip(full, part(start - before, 100), strict=True):
            torch.testing.assert_close(late[before:], whole[start:])
    # One row fewer is too few.
    assert (part(41 - before, 100)[1][before - 1] - full[1][40]).abs().max() > 1e-3


# -- rounding of the released model ----------------------------------------------------------------


def test_e4m3_grid_is_that_of_torch() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert e4m3_grid().tolist() == codes.double().tolist()


def test_e4m3_rounding_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.exp2(torch.arange(20000) % 18 - 10)
    grid = e4m3_grid()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([spread.clamp(-448, 448).double(), grid, ties, -ties])
    expected = x.float().to(torch.float8_e4m3fn).double()
    assert torch.equal(round_to_grid(x, grid), expected)


def test_e2m1_rounds_ties_to_the_even_code() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 0.26, -5.01, -0.75], dtype=torch.float64)
    assert round_to_grid(x, e2m1_grid()).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0.5, -6, -1]


def test_kv_fp8_scales_each_64_dims_and_leaves_the_rotated_ones() -> None:
    kv = torch.full((1, 136), 0.0025, dtype=torch.float64)
    kv[0, 0] = 448.0  # scale 1, so that the smallest step is 2^-9
    kv[0, 64] = 449.0  # scale 2
    rounded, _ = simulate_kv_fp8(kv, 128)
    assert rounded[0, [0, 1, 64, 65]].tolist() == [448, 2**-9, 448, 2**-8]
    assert torch.equal(rounded[0, 128:], kv[0, 128:])


def test_kv_fp8_scale_has_a_floor() -> None:
    assert simulate_kv_fp8(torch.full((1, 64), 1e-10).double(), 64)[0].abs().max() == 0
    assert simulate_kv_fp8(torch.full((1, 64), 1e-5).double(), 64)[0].abs().min() > 0


def test_kv_fp8_gap_is_the_distance_to_another_outcome() -> None:
    kv = torch.zeros(3, 64, dtype=torch.float64)
    kv[0, 0], kv[0, 1] = 300.0, 1.0625 + 1e-6  # just above the middle of 1 and 1.125
    kv[1, 0], kv[1, 1] = 448.0 - 1e-5, 1.0  # just below the next scale
    kv[2, 0], kv[2, 1] = 300.0, 1.0  # zeros and ones are at least half the smallest step away
    gap = simulate_kv_fp8(kv, 64)[1]
    torch.testing.assert_close(gap, torch.tensor([1e-6, 1e-5, 2**-10], dtype=torch.float64))


def test_hadamard_is_sylvesters_and_orthogonal() -> None:
    assert (2 * hadamard(4)).tolist() == [
        [1, 1, 1, 1],
        [1, -1, 1, -1],
        [1, 1, -1, -1],
        [1, -1, -1, 1],
    ]
    torch.testing.assert_close(hadamard(64) @ hadamard(64).T, torch.eye(64, dtype=torch.float64))


def test_index_fp4_rounds_within_half_a_step() -> None:
    x = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = x @ hadamard(64)
    rounded, gap = simulate_index_fp4(x)
    for group in (slice(0, 32), slice(32, 64)):
        scale = torch.exp2(torch.ceil(torch.log2(turned[:, group].abs().amax(1, keepdim=True) / 6)))
        codes = rounded[:, group] / scale
        assert set(codes.abs().unique().tolist()) <= set(e2m1_grid().tolist())
        assert ((codes - turned[:, group] / scale).abs() <= 1).all()
    assert (gap > 0).all() and simulate_index_fp4(torch.zeros(1, 16).double())[0].abs().max() == 0


def test_quant_sim_agrees_with_rounding_inside_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=3, compress_ratios=(4, 128, 4, 0))
    weights = random_weights(config, 0)
    plain = modeling.apply_rotary_pos_emb

    def rounding(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        out = plain(x, cos, sin, unsqueeze_dim)
        if x.shape[-1] == config.index_head_dim:
            return torch_fp4(out @ hadamard(config.index_head_dim).float())
        keys = x.shape[1] == 1  # queries have more heads
        return torch_fp8(out, config.nope_head_dim) if keys else out

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rounding)
    model = hf_model(config, weights)
    clean_rows = 0
    for seed in range(6):
        ids = random_ids(config, 200, seed)
        expected = reference_forward(config, weights, ids, quant_sim=True)
        clean = ~tainted_rows(expected.rounding, NEAR_ROUNDING)
        clean &= ~tainted_rows(expected.margins, NEAR_TIE)
        error = (hf_logits(model, ids) - expected.logits).abs().amax(dim=1)
        assert not (error[clean] > TOLERANCE).any(), seed
        clean_rows += int(clean.sum())
    assert clean_rows > 300


def test_quant_sim_is_off_by_default_and_shows(tiny_weights: Weights) -> None:
    config = preset("tiny")
    ids = random_ids(config, 100, seed=0)
    exact = reference_forward(config, tiny_weights, ids)
    rounded = reference_forward(config, tiny_weights, ids, quant_sim=True)
    assert exact.rounding.isinf().all() and rounded.rounding.isfinite().all()
    assert ((exact.logits - rounded.logits).abs().amax(dim=1) > 1e-2).double().mean() > 0.9


def torch_fp8(x: Tensor, nope: int) -> Tensor:
    """x [..., d] with dims 0..nope, at most 64, rounded by torch's own conversion."""
    head = x[..., :nope]
    scale = torch.exp2(torch.ceil(torch.log2(head.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return torch.cat([(head / scale).to(torch.float8_e4m3fn).float() * scale, x[..., nope:]], dim=-1)


def torch_fp4(x: Tensor) -> Tensor:
    """x [..., 32] to the nearest value; random values meet no ties."""
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 6)))
    values = torch.cat([-e2m1_grid(), e2m1_grid()]).float()
    return values[((x / scale)[..., None] - values).abs().argmin(-1)] * scale
