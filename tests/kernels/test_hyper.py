"""Hyper-connections against float64 loops, and tokens alone against tokens in a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from support.kernels import (
    ROWS,
    U32,
    assert_rows_stand_alone,
    assert_within,
    differing_windows,
    gamma,
    on_tensors,
    same_bits,
    threads,
)
from weft.kernels import hyper
from weft.kernels.hyper import HeadMixer, Mix, Mixer
from weft.kernels.linear import Linear

sinkhorn, gather_streams = on_tensors(hyper.sinkhorn), on_tensors(hyper.gather_streams)
spread_streams = on_tensors(hyper.spread_streams)
# (streams, width of a stream)
SHAPES = [(4, 128), (4, 33), (4, 1), (4, 3), (1, 5), (2, 7), (3, 64)]
ITERATIONS = 20
EPS = 1e-6


def mixer(streams: int, width: int) -> tuple[Mixer, Tensor]:
    """A mixer and its fn in float64."""
    rows = (2 + streams) * streams
    fn = torch.randn(rows, streams * width) * (streams * width) ** -0.5
    base, scale = torch.randn(rows), torch.tensor([0.7, -1.3, 1.9])
    module = Mixer(Linear(fn), base, scale, streams=streams, iterations=ITERATIONS, hc_eps=EPS, norm_eps=EPS)
    return module, fn.double()


def exact_sinkhorn(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """Rows j by softmax, then columns and rows in turn, as the published code does."""
    n = range(len(logits))
    comb = [[math.exp(v - max(row)) for v in row] for row in logits]
    comb = [[v / sum(row) + EPS for v in row] for row in comb]
    for i in range(iterations):
        if i:
            comb = [[v / (sum(row) + EPS) for v in row] for row in comb]
        columns = [sum(comb[j][k] for j in n) + EPS for k in n]
        comb = [[comb[j][k] / columns[k] for k in n] for j in n]
    return comb


def sinkhorn_bound(streams: int, spread: float, of_logits: float = 0.0) -> float:
    """Relative: each of 2 * 20 normalisations adds streams + 3 roundings, which none of them magnifies (they
    contract distances between ratios); an error of the logits moves rows and columns by twice itself each."""
    return gamma(2 * ITERATIONS * (streams + 3)) + (spread + 4) * U32 + 4 * of_logits


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_sinkhorn_is_close(streams: int, spread: float) -> None:
    logits = torch.randn(9, streams, streams) * spread
    exact = torch.tensor([exact_sinkhorn(one, ITERATIONS) for one in logits.double().tolist()]).double()
    bound = sinkhorn_bound(streams, float(logits.max() - logits.min()))
    assert_within(sinkhorn(logits, ITERATIONS, EPS), exact, bound * exact)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_few_iterations_of_sinkhorn(iterations: int) -> None:
    """Before it converges: every step and their order show."""
    logits = torch.randn(5, 4, 4) * 3
    exact = torch.tensor([exact_sinkhorn(one, iterations) for one in logits.double().tolist()]).double()
    assert_within(sinkhorn(logits, iterations, EPS), exact, sinkhorn_bound(4, 30.0) * exact)


def test_sinkhorn_is_doubly_stochastic() -> None:
    comb = sinkhorn(torch.randn(50, 4, 4), ITERATIONS, EPS)
    assert_within(comb.sum(1), torch.ones(50, 4).double(), 1e-5)
    assert_within(comb.sum(2), torch.ones(50, 4).double(), 1e-3)


@pytest.mark.parametrize(("streams", "width"), SHAPES)
def test_mixer_is_close(streams: int, width: int) -> None:
    module, fn = mixer(streams, width)
    h = torch.randn(5, streams, width) * 3
    got = on_tensors(module)(h)
    flat = h.double().flatten(1)
    factor = (flat.square().mean(1, keepdim=True) + EPS).rsqrt()
    # The gates of a mixer are kept negated.
    sign = torch.ones(len(fn)).double()
    sign[: 2 * streams] = -1
    scale, base = (sign * torch.from_numpy(x).double() for x in (module.scale, module.base))
    mix = flat @ fn.T * factor * scale + base
    terms = (flat.abs() @ fn.abs().T * factor * scale.abs()) + base.abs()
    error = gamma(2 * streams * width + 12) * terms
    pre, post = mix[:, :streams].sigmoid() + EPS, mix[:, streams : 2 * streams].sigmoid() * 2
    # The sigmoid's slope is at most 1/4.
    assert_within(got.pre, pre, error[:, :streams] / 4 + 6 * U32 * pre)
    assert_within(got.post, post, error[:, streams : 2 * streams] / 2 + 6 * U32 * post)
    logits = mix[:, 2 * streams :].view(5, streams, streams)
    comb = torch.tensor([exact_sinkhorn(one, ITERATIONS) for one in logits.tolist()]).double()
    spread = float(logits.max() - logits.min())
    assert_within(got.comb, comb, sinkhorn_bound(streams, spread, float(error.max())) * comb)


def test_gates_of_a_mixer_that_reads_nothing() -> None:
    """Without a product to blur them the gates are exact enough to tell which of them hc_eps is added to."""
    base = torch.linspace(-30, 5, 24)
    module = Mixer(
        Linear(torch.zeros(24, 8)), base, torch.ones(3), streams=4, iterations=2, hc_eps=EPS, norm_eps=EPS
    )
    gates = base.double().sigmoid()
    got = on_tensors(module)(torch.randn(1, 4, 2))
    assert_within(got.pre[0], gates[:4] + EPS, 8 * U32 * (gates[:4] + EPS))
    assert_within(got.post[0], gates[4:8] * 2, 8 * U32 * gates[4:8] * 2)
    head = HeadMixer(Linear(torch.zeros(4, 8)), base[:4], torch.ones(1), hc_eps=EPS, norm_eps=EPS)
    exact = (gates[:4] + EPS).sum().expand(1, 2)
    assert_within(on_tensors(head)(torch.ones(1, 4, 2)), exact, 16 * U32 * exact)


@pytest.mark.parametrize(("streams", "width"), SHAPES)
def test_gather_and_spread_are_close(streams: int, width: int) -> None:
    h, y = torch.randn(5, streams, width), torch.randn(5, width)
    mix = Mix(torch.rand(5, streams), torch.rand(5, streams), torch.rand(5, streams, streams))
    gathered, spread = torch.zeros(5, width).double(), torch.zeros(5, streams, width).double()
    terms = torch.zeros_like(spread)
    for t in range(5):
        for k in range(streams):
            gathered[t] += mix.pre[t, k].double() * h[t, k].double()
            parts = [mix.comb[t, j, k].double() * h[t, j].double() for j in range(streams)]
            parts.append(mix.post[t, k].double() * y[t].double())
            spread[t, k] = sum(parts)
            terms[t, k] = sum(part.abs() for part in parts)
    whole = (h.double().abs() * mix.pre.double()[:, :, None]).sum(1)
    assert_within(gather_streams(h, mix.pre), gathered, gamma(streams + 1) * whole)
    got = spread_streams(h, y, mix)
    assert_within(got, spread, gamma(streams + 2) * terms)


@pytest.mark.parametrize(("streams", "width"), SHAPES)
def test_head_mixer_is_close(streams: int, width: int) -> None:
    fn = torch.randn(streams, streams * width) * (streams * width) ** -0.5
    base, scale = torch.randn(streams), torch.tensor([1.7])
    h = torch.randn(5, streams, width)
    got = on_tensors(HeadMixer(Linear(fn), base, scale, hc_eps=EPS, norm_eps=EPS))(h)
    flat = h.double().flatten(1)
    factor = (flat.square().mean(1, keepdim=True) + EPS).rsqrt() * 1.7
    pre = (flat @ fn.double().T * factor + base.double()).sigmoid() + EPS
    error = gamma(2 * streams * width + 12) * (flat.abs() @ fn.double().abs().T * factor + base.double().abs()) / 4
    weights = pre * gamma(streams + 8) + error + 1e-7 * pre  # scale 1.7 is not a float32
    exact = (pre[:, :, None] * h.double()).sum(1)
    assert got.dtype == torch.float32
    assert_within(got, exact, (weights[:, :, None] * h.double().abs()).sum(1))


def all_parts(mix: Mix) -> Tensor:
    return torch.cat([part.flatten(1) for part in mix], 1)


@pytest.mark.parametrize(("streams", "width"), SHAPES)
def test_tokens_stand_alone(streams: int, width: int) -> None:
    module, fn = mixer(streams, width)
    h, y = torch.randn(ROWS, streams, width), torch.randn(ROWS, width)
    assert_rows_stand_alone(lambda h: all_parts(on_tensors(module)(h)), h)
    mix = on_tensors(module)(h)
    assert_rows_stand_alone(gather_streams, h, mix.pre)
    assert_rows_stand_alone(lambda h, y, *mix: spread_streams(h, y, Mix(*mix)), h, y, *mix)
    head = HeadMixer(
        Linear(fn[:streams].float()), torch.randn(streams), torch.tensor([1.7]), hc_eps=EPS, norm_eps=EPS
    )
    assert_rows_stand_alone(on_tensors(head), h)


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 7, 8, 16])
def test_matrices_stand_alone(streams: int) -> None:
    assert_rows_stand_alone(lambda logits: sinkhorn(logits, ITERATIONS, EPS), torch.randn(ROWS, streams, streams))


def test_matrices_as_columns_of_a_product() -> None:
    """The mixer passes a slice of its product, whose rows are wider than a matrix."""
    product = torch.randn(33, 24)
    inside = sinkhorn(product[:, 8:].unflatten(1, (4, 4)), ITERATIONS, EPS)
    assert same_bits(inside, sinkhorn(product[:, 8:].reshape(33, 4, 4).clone(), ITERATIONS, EPS))


def test_tokens_stand_alone_in_the_released_width() -> None:
    module, _ = mixer(4, 4096)
    h, y = torch.randn(20, 4, 4096), torch.randn(20, 4096)

    def run(h: Tensor, y: Tensor) -> Tensor:
        mix = on_tensors(module)(h)
        return torch.cat((gather_streams(h, mix.pre), spread_streams(h, y, mix).flatten(1)), 1)

    assert_rows_stand_alone(run, h, y)


def test_two_threads() -> None:
    for streams, width in ((4, 128), (4, 33), (4, 1024)):
        h, y = torch.randn(40, streams, width), torch.randn(40, width)
        with threads(2):
            module, _ = mixer(streams, width)

            def run(h: Tensor, y: Tensor, module: Mixer = module) -> Tensor:
                mix = on_tensors(module)(h)
                spread = spread_streams(h, y, mix).flatten(1)
                return torch.cat((all_parts(mix), gather_streams(h, mix.pre), spread), 1)

            assert differing_windows(run, h, y, sizes=(1, 2, 3, 8, 17, 33)) == []


def test_inputs_are_not_changed() -> None:
    module, _ = mixer(4, 8)
    h, y = torch.randn(3, 4, 8), torch.randn(3, 8)
    kept = h.clone(), y.clone()
    spread_streams(h, y, on_tensors(module)(h))
    assert same_bits(h, kept[0])
    assert same_bits(y, kept[1])
    logits = torch.randn(1, 4, 4)
    before = logits.clone()
    sinkhorn(logits, 2, EPS)
    assert same_bits(logits, before)
