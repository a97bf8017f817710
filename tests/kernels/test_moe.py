"""Mixture of experts against float64 loops; a token's bits apart from the other tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.kernels import (
    U16,
    U32,
    assert_rows_stand_alone,
    assert_within,
    differing_windows,
    gamma,
    on_tensors,
    same_bits,
    threads,
)
from weft.kernels import activation, moe
from weft.kernels.linear import Linear
from weft.kernels.moe import Expert

sqrt_softplus, swiglu = on_tensors(activation.sqrt_softplus), on_tensors(activation.swiglu)
expert_weights, route, run_experts = map(on_tensors, (moe.expert_weights, moe.route, moe.run_experts))

# (experts, chosen per token, width, inner width)
SHAPES = [(8, 3, 128, 64), (4, 1, 33, 3), (5, 5, 64, 33), (16, 6, 48, 20)]
Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
LIMIT = 1.0
TOKENS = 110


class Layer:
    """Random experts and a shared one; weights are kept for the reference."""

    def __init__(self, experts: int, k: int, width: int, inner: int, dtype: torch.dtype) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) * columns**-0.5).to(dtype)

        self.k, self.width, self.dtype = k, width, dtype
        self.matrices = [(weight(2 * inner, width), weight(width, inner)) for _ in range(experts + 1)]
        self.modules = [Expert(Linear(w13), Linear(w2)) for w13, w2 in self.matrices]
        self.bias = torch.randn(experts) * 0.1
        self.gate = Linear(torch.randn(experts, width) * width**-0.5)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = sqrt_softplus(self.gate(x))
        experts = route(scores, self.bias, self.k)
        return experts, expert_weights(scores, experts, 1.5)

    def run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return run_experts(x, experts, weights, self.modules[:-1], self.modules[-1], LIMIT)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.routed(x))


def exact_expert(w13: Tensor, w2: Tensor, x: Tensor, weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One token through one expert in float64, and a bound carried along.

    Products are off by gamma of their terms; silu's slope is below 1.1; narrow dtypes round gate, up, the input of
    w2 and the result.
    """
    w13, w2, x = w13.double(), w2.double(), x.double()
    narrow = U16 if dtype == torch.bfloat16 else 0.0
    both = w13 @ x
    error = gamma(len(x)) * (w13.abs() @ x.abs())
    error = error + narrow * (both.abs() + error)
    (gate, up), (gate_error, up_error) = both.chunk(2), error.chunk(2)
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    silu = gate * gate.sigmoid()
    hidden = silu * up * weight
    hidden_error = (1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error) * weight
    hidden_error = hidden_error + (9 * U32 + narrow) * (hidden.abs() + hidden_error)
    out = w2 @ hidden
    bound = w2.abs() @ hidden_error + gamma(len(hidden)) * (w2.abs() @ hidden.abs())
    return out, bound + narrow * (out.abs() + bound)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_float64(shape: Shape, dtype: torch.dtype) -> None:
    layer = Layer(*shape, dtype)
    x = torch.randn(13, layer.width).to(dtype)
    experts, weights = layer.routed(x)
    got = layer.run(x, experts, weights)
    assert got.dtype == torch.float32
    for t in range(13):
        used = [(layer.matrices[e], float(w)) for e, w in zip(experts[t], weights[t], strict=True)]
        used.append((layer.matrices[-1], 1.0))
        parts = [exact_expert(*matrices, x[t], weight, dtype) for matrices, weight in used]
        sizes = sum(out.abs() + bound for out, bound in parts)
        bound = sum(bound for _, bound in parts) + gamma(len(parts)) * sizes
        assert_within(got[t], sum(out for out, _ in parts), bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_added_in_ascending_order(dtype: torch.dtype) -> None:
    """The sum written out: expert by expert, lowest first, then the shared one; the same bits."""
    layer = Layer(*SHAPES[0], dtype)
    x = torch.randn(17, layer.width).to(dtype)
    experts, weights = layer.routed(x)
    got = layer.run(x, experts, weights)

    def one(expert: Expert, row: Tensor, weight: Tensor | None) -> Tensor:
        hidden = swiglu(*expert.w13(row).chunk(2, dim=1), LIMIT)
        return expert.w2(hidden if weight is None else hidden * weight).float()

    for t in range(17):
        row = x[t : t + 1]
        total = one(layer.modules[experts[t, 0]], row, weights[t, 0])
        for slot in range(1, layer.k):
            total = total + one(layer.modules[experts[t, slot]], row, weights[t, slot])
        assert same_bits(got[t : t + 1], total + one(layer.modules[-1], row, None))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_stand_alone(shape: Shape, dtype: torch.dtype) -> None:
    layer = Layer(*shape, dtype)
    assert_rows_stand_alone(layer, torch.randn(TOKENS, layer.width).to(dtype))


def test_load_of_the_experts_does_not_matter() -> None:
    """A token's experts may have it alone or be shared with all others."""
    layer = Layer(*SHAPES[0], torch.float32)
    x = torch.randn(60, layer.width)
    mine, weights = torch.tensor([[1, 4, 6]]), torch.rand(60, 3)
    alone = layer.run(x[:1], mine, weights[:1])
    for others in ([0, 2, 3], [1, 4, 6], [4, 5, 7]):
        experts = torch.cat((mine, torch.tensor([others]).expand(59, 3)))
        assert same_bits(layer.run(x, experts, weights)[:1], alone)


def test_two_threads() -> None:
    with threads(2):
        layer = Layer(*SHAPES[0], torch.float32)
        assert differing_windows(layer, torch.randn(40, layer.width), sizes=(1, 2, 3, 8, 33)) == []


def test_route_takes_the_best_biased_scores() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.4, 0.3], [0.2, 0.2, 0.2, 0.2]])
    assert route(scores, torch.zeros(4), 2).tolist() == [[0, 2], [0, 1]]
    assert route(scores, torch.tensor([0.0, 1.0, 0.0, 0.3]), 2).tolist() == [[1, 3], [1, 3]]


def test_route_breaks_ties_by_the_lower_expert() -> None:
    scores = torch.randint(0, 3, (200, 16)).float()
    bias = torch.randint(0, 2, (16,)).float()
    for row, got in zip((scores + bias).tolist(), route(scores, bias, 6).tolist(), strict=True):
        assert got == sorted(sorted(range(16), key=lambda e, row=row: (-row[e], e))[:6])


@pytest.mark.parametrize("k", [1, 3, 6])
def test_weights_are_shares_of_the_unbiased_scores(k: int) -> None:
    """k - 1 additions, a division and a product; all terms are positive."""
    scores = torch.rand(40, 8) + 0.01
    experts = torch.stack([torch.randperm(8)[:k].sort().values for _ in range(40)])
    chosen = scores.double().gather(1, experts)
    exact = chosen / chosen.sum(1, keepdim=True) * 2.5
    got = expert_weights(scores, experts, 2.5)
    assert_within(got, exact, gamma(k + 2) * exact)
    assert_rows_stand_alone(lambda scores, experts: expert_weights(scores, experts, 2.5), scores, experts)


def test_inputs_are_not_changed() -> None:
    layer = Layer(*SHAPES[0], torch.float32)
    x = torch.randn(9, layer.width)
    experts, weights = layer.routed(x)
    kept = x.clone(), experts.clone(), weights.clone()
    layer.run(x, experts, weights)
    assert all(same_bits(a, b) for a, b in zip(kept, (x, experts, weights), strict=True))
