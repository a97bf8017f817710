"""Triton's interpreter, corrected, gives what torch gives; and it counts bytes."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from weft.kernels.gpu.interpreter import launches, traffic  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def _arithmetic(x, y, added, scaled, negated, less, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(added + at, a + b)
    tl.store(scaled + at, a * b)
    tl.store(negated + at, -a)
    tl.store(less + at, a < b)


def test_bfloat16_arithmetic() -> None:
    x, y = torch.randn(512).bfloat16(), torch.randn(512).bfloat16()
    added, scaled, negated = (torch.empty_like(x) for _ in range(3))
    less = torch.empty(512, dtype=torch.bool)
    _arithmetic[(1,)](x, y, added, scaled, negated, less, 512)
    assert torch.equal(added, x + y) and torch.equal(scaled, x * y)
    assert torch.equal(negated, -x) and torch.equal(less, x < y)


@triton.jit
def _convert(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def _quantise(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(x), dtype=dtype)
    _convert[(1,)](x, out, len(x))
    return out


def test_rounding_to_bfloat16() -> None:
    """To nearest even, ties too: every middle between two of its values around 1, and what lies beside."""
    steps = torch.arange(256).float() / 256 + 1
    x = torch.cat((steps, steps.nextafter(torch.tensor(9.0)), steps * 1e30, steps * 1e-39))
    assert torch.equal(converted(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(converted(x.bfloat16(), torch.float32), x.bfloat16().float())
    whole = torch.arange(-512, 512, dtype=torch.int32)
    assert torch.equal(converted(whole, torch.bfloat16), whole.bfloat16())
    assert torch.equal(converted(whole.bfloat16(), torch.int32), whole.bfloat16().int())


def test_rounding_to_e4m3() -> None:
    """All of its values, all middles between them, and beyond: saturated, as the hardware's conversion does."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beyond = torch.tensor([449.0, 1e6, float("inf")])
    x = torch.cat((codes, middles, beyond))
    x = torch.cat((x, -x))[:512]
    out = torch.empty(512, dtype=torch.uint8)
    _quantise[(1,)](x, out, 512)
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@triton.jit
def _multiply(x, y, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(x + i * SIZE + j), tl.load(y + i * SIZE + j)
    tl.store(out + i * SIZE + j, tl.dot(a, b, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype) -> None:
    x, y, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    _multiply[(1,)](x, y, out, 32, "ieee")
    assert (out.double() - x.double() @ y.double()).abs().max() < 32 * 2.0**-23 * 16


def test_tf32_products_round_as_the_hardware_does() -> None:
    x, y, out = torch.randn(32, 32), torch.eye(32), torch.empty(32, 32)
    _multiply[(1,)](x, y, out, 32, "tf32")
    error = (out - x).abs() / x.abs()
    assert 0 < error.max() <= 2.0**-11


def test_traffic_counts_what_is_not_masked() -> None:
    x, out = torch.randn(64), torch.empty(64)
    with traffic() as moved:
        _masked[(1,)](x, out, 10, 64)
    assert (moved.loaded, moved.stored, moved.total) == (40, 256, 296)
    with traffic() as moved:
        pass
    assert moved.total == 0


@triton.jit
def _masked(x, out, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < count, other=0.0))


def test_launches_are_kernels_and_torch_ops_that_run() -> None:
    """Not views, allocations, ops on nothing, or what the interpreter does with torch itself."""
    x, out = torch.randn(64).bfloat16(), torch.empty(64)
    wide = torch.randn(4, 8)
    with launches() as seen:
        _convert[(3,)](x, out, 64)
        top, rest = torch.empty(2, 64)
        part = wide[:, 2:6].unflatten(1, (2, 2)).transpose(0, 1)
        wide.view(torch.int32), wide.contiguous(), wide.float(), wide[:0].clone(), torch.zeros(0)
        torch.add(top, 1.0, out=rest)
        part.contiguous()
        wide.to(torch.float64)
        top.zero_()
        torch.zeros(3).sum().item()
        _masked[(1,)](out, out, 10, 64)
    assert seen.kernels == ["_convert", "_masked"]
    ops = ["add", "clone", "_to_copy", "zero_", "zeros", "sum", "_local_scalar_dense"]
    assert seen.torch_ops == [f"aten.{name}" for name in ops]
    assert seen.names[0] == "_convert" and seen.names[-1] == "_masked"
    with launches() as seen:
        pass
    assert seen.names == []
