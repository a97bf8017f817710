"""The indexer's queries against float64: rounding to both formats, their bits across batches, and their bytes."""

import pytest
import torch

from support.kernels import in_wider_rows
from weft.kernels.gpu.indexer import index_query, least_query_bytes
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.reference.indexer import example, quantise_e2m1, query_values, rotated

NAMES = ["e4m3", "e2m1"]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "dim", "rope"), [(64, 128, 64), (5, 32, 16), (1, 64, 2)])
def test_a_query_is_rounded_once(kind, hadamard, dtype, heads, dim, rope, device):
    """e4m3 has 3 bits behind the point: half of the last is 2^-4 of a value, or 2^-10 below the normal numbers, in
    units of the scale. e2m1 has 1: 2^-2, or 1/4. float32 adds 2^-20 for rotation, Hadamard and division."""
    data = example(2, 8, rows=3, heads=heads, dim=dim, rope=rope, device=device)
    got = index_query(
        data.q.to(dtype), data.weights, data.cos_sin, codes=kind, hadamard=hadamard, implementation="triton"
    )
    want = rotated(data.q.to(dtype), data.cos_sin, hadamard)
    largest = want.abs().amax(2, keepdim=True)
    if kind == "e4m3":
        scale = (got.weights / data.weights)[..., None].double()
        values = query_values(got) * scale
        torch.testing.assert_close(scale, largest / 448, rtol=2.0**-20, atol=0)
        error = 2.0**-4 * want.abs() + 2.0**-10 * scale
    else:
        values = query_values(got)
        scale = torch.exp2(got.scales.double() - 127).repeat_interleave(dim // got.scales.shape[2], 2)
        grouped = want.unflatten(2, (got.scales.shape[2], -1)).abs().amax(3)
        factor = torch.exp2(got.scales.double() - 127)
        assert (grouped <= 6.0 * factor * (1 + 2.0**-20)).all() and (grouped > 3.0 * factor * (1 - 2.0**-20)).all()
        error = torch.maximum(0.25 * want.abs(), 0.25 * scale)
        assert torch.equal(got.weights, data.weights)
    assert ((values - want).abs() <= error + 2.0**-20 * largest).all()


def test_e2m1_ties_go_to_even_codes(device):
    """Every middle between two values, and the values, with a scale of 1 and of 2^-3."""
    steps = torch.arange(-24, 25, device=device) / 4.0
    q = torch.zeros(1, 2, 64, device=device)
    q[0, 0, :49], q[0, 1, :49] = steps, steps / 8
    q[0, :, 63] = torch.tensor((6.0, 0.75), device=device)
    q[0, :, 31] = q[0, :, 63]
    turn = torch.tensor([[1.0, 0.0]], device=device)
    got = index_query(
        q, torch.ones(1, 2, device=device), turn, codes="e2m1", hadamard=False, implementation="triton"
    )
    codes, scales = torch.empty_like(got.codes), torch.empty_like(got.scales)
    quantise_e2m1(q.double(), codes, scales)
    assert torch.equal(got.codes, codes) and torch.equal(got.scales, scales)
    assert got.scales.tolist() == [[[127, 127], [124, 124]]]


@pytest.mark.parametrize("kind", NAMES)
def test_extreme_queries(kind, device):
    """Zeros get the least scale, and the largest bfloat16 stays finite."""
    q = torch.zeros(3, 2, 32, device=device)
    q[1], q[2, 0, 5] = 3e38, 1e-40
    turn = torch.tensor([[1.0, 0.0]], device=device).repeat(3, 1)
    got = index_query(
        q, torch.ones(3, 2, device=device), turn, codes=kind, hadamard=False, implementation="triton"
    )
    values = query_values(got) * (got.weights[..., None].double() if kind == "e4m3" else 1.0)
    assert (values[0] == 0).all() and (values[2].abs() < 1e-37).all()
    torch.testing.assert_close(values[1], q[1].double(), rtol=0.25, atol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_a_query_does_not_depend_on_its_neighbours(kind, device):
    data = example(2, 8, rows=5, heads=20, device=device)
    arguments = (data.q, data.weights, data.cos_sin)
    whole = index_query(*arguments, codes=kind, hadamard=True, implementation="triton")
    for token in (0, 7):
        alone = index_query(
            *(x[token : token + 1] for x in arguments), codes=kind, hadamard=True, implementation="triton"
        )
        assert torch.equal(alone.codes.view(torch.uint8), whole.codes[token : token + 1].view(torch.uint8))
        assert torch.equal(alone.weights, whole.weights[token : token + 1])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("kind", NAMES)
def test_columns_of_wider_rows_and_a_factor_are_the_same_queries(kind, implementation, device):
    """As one product gives the queries beside others', and another the weights beside the compressor's rows."""
    data = example(2, 8, rows=2, heads=20, device=device)
    how = {"codes": kind, "hadamard": True, "implementation": implementation}
    factor = (20 * 128) ** -0.5
    whole = index_query(data.q, data.weights * factor, data.cos_sin, **how)
    for before in (0, 8, 5):
        q = in_wider_rows(data.q.flatten(1), before, 64 - before).unflatten(1, (20, 128))
        got = index_query(q, in_wider_rows(data.weights, before, 3), data.cos_sin, factor=factor, **how)
        assert torch.equal(got.codes.view(torch.uint8), whole.codes.view(torch.uint8))
        assert torch.equal(got.weights, whole.weights)
        assert kind == "e4m3" or torch.equal(got.scales, whole.scales)


def test_no_queries(device):
    empty = torch.zeros(0, 64, 128, device=device)
    got = index_query(
        empty, torch.zeros(0, 64, device=device), torch.zeros(0, 64, device=device), codes="e4m3", hadamard=True
    )
    assert got.codes.shape == (0, 64, 128) and got.weights.shape == (0, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted by the interpreter")
@pytest.mark.parametrize("kind", NAMES)
def test_bytes(kind):
    data = example(2, 8, rows=2)
    with traffic() as moved:
        index_query(data.q, data.weights, data.cos_sin, codes=kind, hadamard=True)
    assert moved.total <= 1.3 * least_query_bytes(data.q, 64, kind)
