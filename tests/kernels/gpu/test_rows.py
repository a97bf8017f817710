"""Rows of every layout: packed by the reference, by the host's pools and by the device functions, to the byte."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from support.kernels import assert_within
from weft.kernels.gpu.base import Pages
from weft.kernels.kv_rows import PagedRows
from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8, kv_fp4_v41, kv_fp8, kv_fp8_v41
from weft.kernels.reference.compress import sylvester
from weft.kernels.reference.heads import angles, rotate
from weft.kernels.reference.rows import error_bound, gather, pack, store, unpack
from weft.kernels.triton import common

LAYOUTS = {
    "v4": kv_fp8(4, 448, 64),
    "v4, small": kv_fp8(8, 48, 16),
    "v4.1 fp8": kv_fp8_v41(4),
    "v4.1 fp8, odd": kv_fp8_v41(4, 96),
    "v4.1 fp4": kv_fp4_v41(4),
    "v4.1 fp4, odd": kv_fp4_v41(2, 80),
    "fp8 keys": keys_fp8(4, 128),
    "fp8 keys, odd": keys_fp8(3, 40),
    "fp4 keys": keys_fp4(4, 128),
    "fp4 keys, small": keys_fp4(4, 32),
    "mostly plain": RowLayout(4, 16, 48, group=16),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def rows_of(layout: RowLayout, count: int = 40) -> Tensor:
    """Rows of many magnitudes, zeros, and values at the borders of scales and codes among them.

    Within what an e4m3 scale reaches: 448 times the largest code.
    """
    values = torch.randn(count, layout.channels) * torch.exp2(torch.randint(-30, 8, (count, 1)))
    values[1] = 0.0
    values[2, ::2] = 0.0
    for row, top in ((3, 448.0), (4, 6.0), (5, 448.0 * 2.0**-9), (6, 1e-4), (7, 6.0 * 2.0**-126)):
        values[row] = torch.linspace(-1, 1, layout.channels) * top  # a scale's exact border ...
        values[row, 0] = -top
    for row in (3, 4, 5):
        above = values[row].clone()
        above[0] = torch.nextafter(above[0], torch.tensor(-torch.inf))  # ... and just behind it
        values[row + 5] = above
    codes = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -5.0, 0.0, -0.0])  # ties of e2m1
    values[11] = codes.repeat(layout.channels // 12 + 1)[: layout.channels]
    return values


@each_layout
def test_a_row_comes_back_within_the_formats_error(layout: RowLayout) -> None:
    values = rows_of(layout)
    data, scales = pack(values, layout)
    assert (data.shape[1], scales.shape[1]) == (layout.data_bytes, layout.scale_bytes)
    # Below float32's normal numbers there is no bound, nor a need.
    assert_within(unpack(data, scales, layout), values.double(), error_bound(values, layout) + 2.0**-126)


@pytest.mark.parametrize(
    ("layout", "row", "page"),
    [
        (kv_fp8(64, 448, 64), 584, 37440),
        (kv_fp8_v41(64), 528, 33792),
        (kv_fp4_v41(64), 288, 18432),
        (keys_fp8(64, 128), 132, 8448),
        (keys_fp4(64, 128), 68, 4352),
    ],
)
def test_sizes(layout: RowLayout, row: int, page: int) -> None:
    assert (layout.row_bytes, layout.page_bytes) == (row, page)


@each_layout
def test_the_hosts_pools_pack_the_same_bytes(layout: RowLayout) -> None:
    values = rows_of(layout)
    rows = torch.randperm(3 * layout.page + 40)[:40]
    host = PagedRows(4 + 40 // layout.page, layout)
    pool = Pages.empty(4 + 40 // layout.page, layout)
    host.store(rows, values)
    store(pool, rows.int(), values)
    assert torch.equal(host.bytes, pool.bytes)
    assert torch.equal(host.gather(rows), gather(pool, rows).float())


@each_layout
def test_rows_that_are_none(layout: RowLayout) -> None:
    pool = Pages.empty(3, layout)
    pool.bytes.fill_(255)
    values = rows_of(layout)[8:11]
    store(pool, torch.tensor([-1, 1, layout.page + 1]), values)
    written = pool.bytes != 255
    assert not written[2].any()
    got = gather(pool, torch.tensor([-1, 1]))
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert torch.equal(got[1], unpack(*pack(values[1:2], layout), layout)[0])


def test_the_null_row_reads_as_zeros() -> None:
    for layout in LAYOUTS.values():
        assert not gather(Pages.empty(1, layout), torch.tensor([0])).any()


@triton.jit
def store_kernel(
    values,
    rows,
    pool,
    R: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAGE: tl.constexpr,
    CODED: tl.constexpr,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    x = tl.load(values + row[:, None] * CHANNELS + column, mask=column < CHANNELS, other=0.0)
    common.store_rows(
        x, tl.load(rows + row), pool, PAGE, CODED, PLAIN, GROUP, CODES, SCALES, SCALE_BYTES, PAGE_BYTES, LEAST
    )


@each_layout
@pytest.mark.parametrize("many", [1, 4])
def test_the_device_function_packs_the_same_bytes(layout: RowLayout, many: int, device: str) -> None:
    values = rows_of(layout, 12)
    rows = (torch.randperm(3 * layout.page + 12)[:12] + 1).int()
    rows[8] = -1
    pages = 5 + 12 // layout.page
    got, want = Pages.empty(pages, layout, device), Pages.empty(pages, layout)
    columns = triton.next_power_of_2(layout.channels)
    constants = common.layout_constants(layout)
    store_kernel[(12 // many,)](
        values.to(device), rows.to(device), got.bytes, many, columns, layout.channels, **constants
    )
    store(want, rows, values)
    assert torch.equal(got.bytes.cpu(), want.bytes)


@triton.jit
def hadamard_kernel(values, R: tl.constexpr, C: tl.constexpr):
    at = values + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(at, common.hadamard(tl.load(at)))


@pytest.mark.parametrize("size", [2, 32, 128])
def test_hadamard(size: int, device: str) -> None:
    """Adds and subtractions in log2 steps, and one product."""
    values = torch.randn(4, size)
    got = values.to(device, copy=True)
    hadamard_kernel[(1,)](got, 4, size)
    want = values.double() @ sylvester(size, values.device)
    unit = 2.0**-24 * (size.bit_length() + 1)
    assert_within(got.cpu(), want, unit * values.double().abs().sum(1, keepdim=True) / size**0.5)


@triton.jit
def rotate_kernel(values, cos_sin, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr):
    row = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    at = values + row[:, None] * D + column
    cos, sin = common.load_rotation(cos_sin, row, row >= 0, D, ROPE, C)
    x = tl.load(at, mask=column < D, other=0.0)
    tl.store(at, common.rotate(x, cos, sin), mask=column < D)


@pytest.mark.parametrize(("width", "rope"), [(64, 16), (48, 48), (80, 2)])
def test_rotation(width: int, rope: int, device: str) -> None:
    values, turn = torch.randn(4, width), angles(torch.tensor([0, 1, 77, 100_000]), rope)
    got = values.to(device, copy=True)
    rotate_kernel[(1,)](got, turn.to(device), 4, triton.next_power_of_2(width), width, rope)
    want = rotate(values.double(), turn)
    assert torch.equal(got.cpu()[:, : width - rope], values[:, : width - rope])
    assert_within(got.cpu(), want, 4 * 2.0**-24 * values.abs().max().item() * 2)
