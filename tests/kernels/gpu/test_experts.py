"""Experts against float64, for every format of weights; bits that depend on nothing but the pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from support.kernels import U16, U32, assert_within, gamma, same_bits
from weft.kernels.gpu.expert_weights import Experts, FloatExperts, Fp4Experts, Fp8Experts
from weft.kernels.gpu.experts import (
    DECODE_TOKENS,
    choose,
    close_experts,
    expert_tiles,
    least_bytes,
    open_experts,
    run_experts,
    tiles_for,
)
from weft.kernels.gpu.interpreter import launches, traffic
from weft.kernels.reference import experts as reference

FORMATS = ("fp8", "fp4", "float")
INTERPRETED = not torch.cuda.is_available()
# The interpreter has tl.dot_scaled from Triton 3.9 on; a GPU needs the instruction.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
BLACKWELL = _VERSION >= (3, 9) if INTERPRETED else torch.cuda.get_device_capability()[0] == 10


def make(format: str, tokens: int, device: str, **sizes: Any) -> dict[str, Any]:
    return reference.example(tokens, format, device, **{"dim": 64, "inner": 32, "count": 8, "k": 3, **sizes})


def sum_bound(x: Tensor, ids: Tensor, experts: Experts, name: str) -> Tensor:
    """Of the error of the products, [pairs, N] float64: x [T, K] or [pairs, K].

    Products of codes are exact (4 significant bits times 4), scales are powers of two: what is left is the
    rounding of K sums, 2^-24 of what is added each. Hopper cuts each of 128 products, and the sum so far, 13 bits
    behind the largest (`test_linear` has the bound that follows); most of these errors are far smaller and of both
    signs, and 2^-9 of all sizes was enough on an H100 and an H200.
    """
    columns = x.shape[1]
    unit = gamma(columns + 2) if x.device.type == "cpu" or isinstance(experts, FloatExperts) else 2.0**-9
    rows = reference.activations(x, experts).abs()
    if len(rows) != ids.numel():
        rows = rows.repeat_interleave(ids.shape[1], 0)
    size = {n: reference.matrix(experts, n, name).abs().T for n in ids.unique().tolist()}
    return unit * torch.stack([row @ size[n] for row, n in zip(rows, ids.flatten().tolist(), strict=True)])


def rounding(x: Tensor) -> float:
    return U16 if x.dtype == torch.bfloat16 else U32


def check(given: dict[str, Any], **how: Any) -> Tensor:
    """Both products, each from the same inputs as its reference."""
    x, ids, weights, experts = (given[name] for name in ("x", "ids", "weights", "experts"))
    hidden = open_experts(**given, **how)
    want = reference.open_experts(**given)
    wrong = sum_bound(x, ids, experts, "w13")
    gate, up = wrong[:, 0::2], wrong[:, 1::2]
    # |silu(g)| <= limit, |silu'| <= 1.1, |u| <= limit; exp, sum, quotient and two products: 2^-20 of it.
    limit, weight = given["limit"], weights.flatten().double()[:, None]
    bound = (limit * up + 1.1 * limit * gate) * weight + 2.0**-20 * want.abs()
    assert_within(hidden, want, bound + rounding(x) * (want.abs() + bound) + 1e-37)
    out = close_experts(hidden, ids, experts, **how)
    want = reference.close_experts(hidden, ids, experts)
    bound = sum_bound(hidden, ids, experts, "w2").view(want.shape)
    assert_within(out, want, bound + rounding(x) * (want.abs() + bound) + 1e-37)
    assert out.dtype == hidden.dtype == x.dtype
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(format: str, dtype: torch.dtype, device: str) -> None:
    """Sizes that are no multiples of tiles or chunks."""
    check(make(format, 5, device, dim=160, inner=96, count=4, k=2, dtype=dtype))


@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_whole_chunks(format: str, device: str) -> None:
    check(make(format, 2, device, dim=256, inner=128, count=3, k=2))


@pytest.mark.skipif(not BLACKWELL, reason="neither Blackwell nor an interpreter of its products")
@pytest.mark.parametrize("tile", [None, 16])
def test_block_scaled(tile: int | None, device: str) -> None:
    given = make("fp4", 5, device, dim=160, inner=96, count=4, k=2)
    tiles = None if tile is None else expert_tiles(given["ids"], 5, tile)
    check(given, tiles=tiles, implementation="triton_sm100")


def test_the_reference_as_an_implementation(device: str) -> None:
    given = make("fp8", 3, device)
    assert_within(
        run_experts(**given, implementation="reference"),
        reference.close_experts(reference.open_experts(**given).bfloat16(), given["ids"], given["experts"]),
        1.0,
    )


@pytest.mark.parametrize("format", ["fp8", "float"])
def test_a_token_has_the_same_bits_in_every_batch(format: str, device: str) -> None:
    """Alone, and among others in another order: by expert in tiles of 16 columns, by pair in tiles of 8."""
    given = make(format, 9, device, count=20)
    together = run_experts(**given)
    order = torch.randperm(9, device=device)
    for rows in (order, order[:6], order[6:7]):
        part = {name: given[name][rows] for name in ("x", "ids", "weights")}
        assert same_bits(run_experts(**{**given, **part}), together[rows])


@pytest.mark.skipif(INTERPRETED, reason="for the GPU's own products")
@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_bits_at_the_models_width(format: str, device: str) -> None:
    """Every shape of tile, of decode and of prefill."""
    given = make(format, 4000, device, dim=4096, inner=2048, count=32, k=6)
    alone = [
        run_experts(**{**given, **{n: given[n][t : t + 1] for n in ("x", "ids", "weights")}}) for t in range(4)
    ]
    for tokens in (8, 64, 256, 400, 4000):
        part = {name: given[name][:tokens] for name in ("x", "ids", "weights")}
        got = run_experts(**{**given, **part})
        assert all(same_bits(got[t : t + 1], alone[t]) for t in range(min(4, tokens))), tokens


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_give_the_bits_of_decode(format: str, tile: int, device: str) -> None:
    given = make(format, 9, device, count=4, k=2)
    tiles = expert_tiles(given["ids"], 5, tile)
    hidden = open_experts(**given, tiles=tiles)
    assert same_bits(hidden, open_experts(**given))
    ids, experts = given["ids"], given["experts"]
    assert same_bits(close_experts(hidden, ids, experts, tiles=tiles), close_experts(hidden, ids, experts))


def test_more_tokens_than_decode_takes(device: str) -> None:
    """The last ones, sorted among all the others, have the bits that they have alone."""
    tokens = DECODE_TOKENS + 3
    given = make("fp8", tokens, device, count=4, k=2, dim=32)
    assert tiles_for(given["ids"], given["experts"]) is not None
    part = {name: given[name][-4:] for name in ("x", "ids", "weights")}
    assert same_bits(run_experts(**given)[-4:], run_experts(**{**given, **part}))


@pytest.mark.parametrize("tokens", [6, 40])
def test_all_tokens_choose_the_same_experts(tokens: int, device: str) -> None:
    """By pair with repeats, and more than a tile of tokens."""
    given = make("fp8", tokens, device, count=40, k=2)
    given["ids"][:, :2] = torch.tensor([7, 39], dtype=torch.int32, device=device)
    check(given)


@pytest.mark.parametrize("tile", [None, 16])
def test_pairs_without_an_expert(tile: int | None, device: str) -> None:
    """Padding: nothing is computed for them, and other pairs are as they were."""
    given = make("fp8", 5, device, count=20)
    want = open_experts(**given)
    given["ids"][2:4, :3] = -1
    tiles = None if tile is None else expert_tiles(given["ids"], 21, tile)
    rest = (given["ids"].flatten() >= 0).nonzero()[:, 0]
    assert same_bits(open_experts(**given, tiles=tiles)[rest], want[rest])


def test_weights_that_are_not_chosen_are_not_read(device: str) -> None:
    given = make("fp8", 2, device, count=9)
    clean = run_experts(**given)
    experts = given["experts"]
    unused = [n for n in range(9) if n not in given["ids"].unique().tolist()]
    w13, w2 = experts.w13.clone(), experts.w2.clone()
    w13.view(torch.uint8)[unused], w2.view(torch.uint8)[unused] = 0x7F, 0x7F  # NaN
    assert unused and same_bits(run_experts(**{**given, "experts": replace(experts, w13=w13, w2=w2)}), clean)


def test_extremes(device: str) -> None:
    given = make("fp8", 6, device, dtype=torch.float32, dim=128, inner=64, count=4, k=2)
    x = given["x"]
    x[0] = 0.0
    x[1] *= 1e-12  # below the least scale
    x[2] = 0.0
    x[2, 7] = 448.0 * 4
    x[3] *= 1e4  # gates and ups at their limits
    given["weights"][4] = 0.0
    out = check(given)
    assert not out[0].any() and not out[4].any()


def test_no_tokens(device: str) -> None:
    given = make("fp8", 0, device)
    assert run_experts(**given).shape == (0, 4, 64)


@pytest.mark.parametrize(("tokens", "count", "tile"), [(1, 8, 16), (50, 8, 16), (33, 60, 32), (1500, 5, 64)])
def test_order_and_tiles(tokens: int, count: int, tile: int, device: str) -> None:
    ids, _ = reference.random_routes(tokens, count, 3, device)
    ids[ids == 2] = 1  # an expert without tokens, one with many
    got = expert_tiles(ids, count + 1, tile, implementation="triton")
    want = expert_tiles(ids, count + 1, tile, implementation="reference")
    assert torch.equal(got.order, want.order)
    used = want.table[:, 2] > 0
    assert torch.equal(got.table[used], want.table[used]) and not got.table[~used, 2].any()
    assert int(want.table[:, 2].sum()) == ids.numel()


def test_two_launches(device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = make("fp8", 1, device, count=2, k=1, dim=32)
    with launches() as count:
        run_experts(**given)
    assert count.names == ["decode_kernel", "decode_kernel"]


def test_bytes_moved(device: str) -> None:
    """At V4-Flash's width, with few experts of few channels."""
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = make("fp8", 1, device, dim=4096, inner=64, count=2, k=1)
    with traffic() as moved:
        run_experts(**given)
    assert moved.total <= 1.3 * least_bytes(1, 2, 1, given["experts"], 2)


@pytest.mark.parametrize(
    ("arch", "experts", "name"),
    [
        ("cpu", Fp8Experts, "reference"),
        ("sm80", Fp8Experts, "reference"),
        ("sm90", Fp8Experts, "triton"),
        ("sm90", Fp4Experts, "triton"),
        ("sm100", Fp4Experts, "triton_sm100"),
        ("sm100", FloatExperts, "triton"),
    ],
)
def test_choice(arch: Any, experts: type[Experts], name: str) -> None:
    assert choose(arch, frozenset({"triton"}), experts).implementation == name
