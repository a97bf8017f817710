"""The experts of a layer: both products of every pair of token and expert, and the order prefill takes them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.gpu.expert_weights import Experts, FloatExperts, Fp4Experts, Fp8Experts
from weft.kernels.gpu.linear import quantise_rows
from weft.kernels.reference import experts as reference

# Up to as many tokens every program finds its pairs by itself; beyond, they are sorted first.
DECODE_TOKENS = 256


@dataclass(frozen=True)
class ExpertTiles:
    """Pairs sorted by expert. order: [P] int32, pair numbers t * (k + 1) + j. table: [tiles, 3] int32: a tile's
    expert, where its pairs begin in the order, and how many there are, `size` at most; 0: nothing to do."""

    order: Tensor
    table: Tensor
    size: int


def run_experts(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, limit: float, *, implementation: str | None = None
) -> Tensor:
    """Every pair's w2(swiglu(w13 x) * weight), which the next hyper-connection adds up.

    x: [T, D] bfloat16 or float32. ids: [T, k + 1] int32, k different routed experts and then the shared one, which
    is the last of `experts`; -1: no expert, and that row of the result is not written. weights: [T, k + 1]
    float32. Returns [T, k + 1, D] of x's dtype. For FP8 and FP4 experts x and the hidden values are rounded to
    e4m3 per row and 128 columns. Source: DeepSeek-V4's published inference code: silu(min(gate, limit)) *
    clamp(up, -limit, limit) * weight in float32, rounded to x's dtype.

    Two launches up to DECODE_TOKENS tokens, beyond that five. Nothing on the host depends on ids.
    """
    tiles = tiles_for(ids, experts, implementation)
    hidden = open_experts(x, ids, weights, experts, limit, tiles=tiles, implementation=implementation)
    return close_experts(hidden, ids, experts, tiles=tiles, implementation=implementation)


def open_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    limit: float,
    *,
    tiles: ExpertTiles | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The first product: x [T, D] -> hidden [T * (k + 1), I]. tiles: the pairs in order, for many tokens."""
    count, dim, inner = experts.shape
    check_tensor("x", x, (None, dim), torch.bfloat16, torch.float32)
    tokens, places = ids.shape
    check_tensor("ids", ids, (len(x), None), torch.int32)
    check_tensor("weights", weights, (tokens, places), torch.float32)
    check(x.is_contiguous() and ids.is_contiguous() and weights.is_contiguous(), "contiguous arguments")
    check(1 < places <= count, places, count)
    out = torch.empty(tokens * places, inner, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    name = implementation or choose(arch(x), installed(), experts).implementation
    if name == "reference":
        return out.copy_(reference.open_experts(x, ids, weights, experts, limit))
    _launch(name, out, x, ids, weights, experts, limit, tiles, gated=True)
    return out


def close_experts(
    hidden: Tensor,
    ids: Tensor,
    experts: Experts,
    *,
    tiles: ExpertTiles | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The second product: hidden [T * (k + 1), I] -> [T, k + 1, D]."""
    _, dim, inner = experts.shape
    tokens, places = ids.shape
    check_tensor("ids", ids, (None, None), torch.int32)
    check_tensor("hidden", hidden, (tokens * places, inner), torch.bfloat16, torch.float32)
    check(hidden.is_contiguous() and ids.is_contiguous(), "contiguous arguments")
    out = torch.empty(tokens, places, dim, dtype=hidden.dtype, device=hidden.device)
    if tokens == 0:
        return out
    name = implementation or choose(arch(hidden), installed(), experts).implementation
    if name == "reference":
        return out.copy_(reference.close_experts(hidden, ids, experts))
    _launch(name, out, hidden, ids, None, experts, 0.0, tiles, gated=False)
    return out


def expert_tiles(ids: Tensor, count: int, tile: int, *, implementation: str | None = None) -> ExpertTiles:
    """Pairs in the order of their experts, those of one in the order of tokens, cut into tiles of one expert.

    ids: [T, k + 1] int32 below `count`. Tiles of expert e begin at number (pairs of lower experts) // tile + e;
    the table has P // tile + count, some of them empty. One launch.
    """
    check_tensor("ids", ids, (None, None), torch.int32)
    check(ids.is_contiguous(), "ids are contiguous")
    if (implementation or portable("expert_tiles", arch(ids), installed()).implementation) == "reference":
        return ExpertTiles(*reference.expert_tiles(ids, count, tile), tile)
    from weft.kernels.triton.experts_permute import expert_tiles as launch

    return ExpertTiles(*launch(ids, count, tile), tile)


def tiles_for(ids: Tensor, experts: Experts, implementation: str | None = None) -> ExpertTiles | None:
    """What `run_experts` sorts pairs into: None for few tokens, which are not sorted."""
    tokens, places = ids.shape
    if tokens <= DECODE_TOKENS or implementation == "reference":
        return None
    name = None if implementation is None else "triton"
    most = 64 if isinstance(experts, Fp4Experts) else 128
    return expert_tiles(
        ids, experts.shape[0], tile_of(tokens, places, experts.shape[0], most), implementation=name
    )


def tile_of(tokens: int, places: int, count: int, most: int) -> int:
    """About as many pairs as an expert has, so that weights are read once and few columns are empty."""
    each = tokens * (places - 1) // (count - 1)
    return next((size for size in (16, 32, 64) if each <= size), most)


def _launch(
    name: str,
    out: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    experts: Experts,
    limit: float,
    tiles: ExpertTiles | None,
    *,
    gated: bool,
) -> None:
    """With tiles, x is quantised first: programs of many tokens would do it too often."""
    check(name in _READERS[type(experts)], name, type(experts))
    scales = None
    if tiles is not None and not isinstance(experts, FloatExperts):
        x, scales = quantise_rows(x, implementation="triton")
    if name == "triton_sm100":
        from weft.kernels.triton.experts_sm100 import run as launch
    else:
        from weft.kernels.triton.experts import run as launch
    launch(out, x, scales, ids, weights, experts, limit, tiles, gated=gated)


# Implementations, besides the reference, that read each kind of weights.
_READERS: dict[type, tuple[str, ...]] = {
    FloatExperts: ("triton",),
    Fp8Experts: ("triton",),
    Fp4Experts: ("triton", "triton_sm100"),
}


def choose(arch: Arch, libraries: frozenset[str], experts: Experts | type[Experts]) -> Choice:
    kind = experts if isinstance(experts, type) else type(experts)
    choice = portable("run_experts", arch, libraries)
    if choice.implementation == "reference" or kind in (FloatExperts, Fp8Experts):
        return choice
    if arch == "sm100":
        return Choice("run_experts", "triton_sm100", "block-scaled FP4 products")
    return choice


def least_bytes(tokens: int, places: int, used: int, experts: Experts, itemsize: int) -> int:
    """Weights of the experts used (`used` routed ones and the shared one), x and the pairs' hidden values and
    outputs once, ids and weights."""
    count, dim, inner = experts.shape
    if isinstance(experts, Fp4Experts):
        weights = (experts.nbytes - experts.shared.nbytes) * used // (count - 1) + experts.shared.nbytes
    else:
        weights = experts.nbytes * (used + 1) // count
    return weights + itemsize * tokens * (dim + places * (2 * inner + dim)) + 8 * tokens * places


OP = Op(
    "run_experts",
    "both products of every pair of token and expert, with the gated activation between them",
    ("reference", "triton", "triton_sm100"),
    (
        Example("FP8", partial(choose, experts=Fp8Experts)),
        Example("FP4", partial(choose, experts=Fp4Experts)),
        Example("plain floats", partial(choose, experts=FloatExperts)),
    ),
)
