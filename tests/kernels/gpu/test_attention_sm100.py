"""Sparse decode for Blackwell, without one: its source run on the CPU, its bytes, layouts, what it compiles to."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from support.gluon_device import Device
from support.kernels import same_bits
from weft.kernels.gpu.attention import least_bytes
from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.output import inverse_rope
from weft.kernels.layouts import is_v4, kv_fp8, kv_fp8_v41
from weft.kernels.reference.attention import Example, example
from weft.kernels.reference.attention import sparse_attention as reference
from weft.kernels.reference.heads import angles
from weft.kernels.reference.rows import gather, store
from weft.kernels.triton.attention_sm100 import (
    DATA,
    DIM,
    KEYS,
    _descriptors,
    aot,
    available,
    moved,
    sparse_decode_sm100,
)

if available():
    from weft.kernels.triton import attention_sm100_kernel, attention_sm100_softmax

FLASH = kv_fp8(64, 448, 64)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
needs_gluon = pytest.mark.skipif(not available(), reason="the kernel is written in the Gluon of Triton 3.9")
# The merge of splits is interpreted, so on the CPU.
runs_source = pytest.mark.skipif(
    not available() or torch.cuda.is_available(), reason="needs Triton 3.9 and no GPU"
)


class Emulated:
    """The kernel, launched on `Device`."""

    def __init__(self, seed: int, without: Any) -> None:
        self.device = Device(seed, without)
        self.kernel = self.device.functions([attention_sm100_kernel, attention_sm100_softmax])["attend"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, num_warps: self.device.run(self.kernel, grid, arguments)


def launch(
    e: Example,
    split: int,
    seed: int = 0,
    without: tuple[str, str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    cos_sin: Tensor | None = None,
) -> Tensor:
    emulated = Emulated(seed, without)
    with patch.object(attention_sm100_kernel, "attend", emulated):
        return sparse_decode_sm100(e.q, e.pool, e.index, e.lengths, e.sink, e.scale, dtype, split, cos_sin)


def check(e: Example, split: int) -> None:
    """The products' type rounds the weights, and float16 also the bfloat16 channels, by its unit u at most; q is
    exact, and so are codes times scales, in float16 to 2^-25. A row rounded so moves a logit by scale * sum |q|
    (u |k| + 2^-25) at most, float32 sums of 512 terms by 2^-15 scale * sum |q| |k|; a weight moves by e^that and
    u, and below 2^-14 (float16) by 2^-25 of the largest. Weights sum to 1 at most, so the output moves by that
    share of the largest row, twice (numerator and denominator), and by float32's sums over the columns."""
    out, want = launch(e, split), reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    unit, columns = UNIT[e.q.dtype], e.index.shape[1]
    assert torch.isfinite(out).all()
    for token in range(len(e.q)):
        rows = e.index[token, : int(e.lengths[token])]
        keys = gather(e.pool, rows[rows >= 0]).abs()
        if not len(keys):
            assert (out[token] == 0).all()
            continue
        size = e.q[token].double().abs()
        shift = ((size @ keys.T).max(1).values * (unit + 2.0**-15) + size.sum(1) * 2.0**-25) * e.scale
        share = 2 * torch.expm1(shift) + 3 * unit + columns * (2.0**-25 + 2.0**-23)
        bound = share[:, None] * keys.max(0).values + 2.0**-24
        assert ((out[token].double() - want[token]).abs() <= bound).all()


@runs_source
@pytest.mark.parametrize(("heads", "dtype"), [(5, torch.float16), (64, torch.bfloat16), (96, torch.float16)])
def test_equals_the_reference(heads: int, dtype: torch.dtype) -> None:
    """Lengths around tiles and splits; -1 at the front, in between, throughout; columns that must not be read."""
    e = example(9, 330, heads, FLASH, dtype=dtype)
    e.lengths[:] = torch.tensor([330, 0, 1, 63, 64, 65, 128, 129, 330])
    e.index[5, 65:] = 1 << 30
    e.index[0, ::3] = -1
    e.index[3, :10] = -1
    e.index[6] = -1
    e.index[8, :200] = -1
    check(e, split=128)


@runs_source
@pytest.mark.parametrize("page", [1, 2, 256])
def test_rows_at_the_ends_of_pages(page: int) -> None:
    """Of magnitude 2^-9 to 2^6, so with scales down to 2^-19."""
    layout = kv_fp8(page, 448, 64)
    assert is_v4(layout)
    e = example(1, 14, 16, layout, pages=5, dtype=torch.bfloat16)
    rows = torch.arange(page, 5 * page, dtype=torch.int32)
    rows = rows[(rows % page < 2) | (rows % page >= page - 2)][-14:]
    store(e.pool, rows, torch.randn(len(rows), DIM) * 2.0 ** torch.randint(-9, 7, (len(rows), 1)))
    e.index[0], e.lengths[0] = torch.nn.functional.pad(rows, (0, 14 - len(rows)), value=-1), len(rows)
    check(e, split=64)


@runs_source
def test_full_width() -> None:
    check(example(1, 640, 64, FLASH, dtype=torch.bfloat16), split=2560)


@runs_source
@pytest.mark.parametrize("dtype", UNIT)
def test_logits_that_grow(dtype: torch.dtype) -> None:
    """Each tile's rows are twice as large as the last one's: bases are outgrown, early sums nearly vanish."""
    e = example(2, 320, 16, FLASH, dtype=dtype)
    size = 2.0 ** (torch.arange(640) % 320 // KEYS)
    store(e.pool, e.index.flatten(), torch.randn(640, DIM) * size[:, None])
    check(e, split=2560)


@runs_source
def test_dtypes_and_strides() -> None:
    """float32 queries are multiplied in float16; the list may be a part of a wider one."""
    e = example(2, 70, 16, FLASH, dtype=torch.float32)
    e = replace(e, q=e.q.half().float())
    part = replace(e, index=torch.cat((e.index, e.index), 1)[:, :70])
    out = launch(replace(e, q=e.q.half()), 2560, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(launch(part, 2560, dtype=torch.bfloat16), out)


@runs_source
@pytest.mark.parametrize("split", [128, 2560])
def test_rotated_back_as_by_a_launch_of_its_own(split: int) -> None:
    e = example(3, 330, 16, FLASH)
    e.lengths[1:] = torch.tensor([100, 0])
    turn = angles(torch.randint(0, 100_000, (3,)), 64)
    for dtype in (torch.bfloat16, torch.float32):
        apart = inverse_rope(launch(e, split, dtype=dtype), turn)
        assert same_bits(launch(e, split, dtype=dtype, cos_sin=turn), apart)


@runs_source
def test_rows_that_are_not_listed_are_not_read() -> None:
    e = example(2, 100, 8, FLASH, pages=8)
    e.index[:, ::7] = -1
    before = launch(e, 2560)
    others = torch.ones(8 * 64, dtype=torch.bool)
    others[e.index[e.index >= 0].long()] = others[0] = False
    rows = others.nonzero()[:, 0]
    for row in rows.tolist():
        at = row % 64 * DATA
        e.pool.bytes[row // 64, at : at + DATA] = 0x7F
    assert torch.equal(launch(e, 2560), before)


@runs_source
def test_a_query_is_its_own() -> None:
    """Alone or among others, and in whatever order copies, products and partitions take their turns."""
    e = example(4, 330, 16, FLASH)
    whole = launch(e, 128)
    for token in range(4):
        part = slice(token, token + 1)
        one = Example(e.q[part], e.pool, e.index[part], e.lengths[part], e.sink, e.scale)
        for seed in (1, 2):
            assert torch.equal(launch(one, 128, seed), whole[part])


STEPS = [("fetch", 0), ("dequantise", 0), ("multiply", 0), ("multiply", 1), ("multiply", 2)]
WAITS = [(f, "mbarrier.wait", n) for f, n in [*STEPS, ("soften", 0), ("soften", 1), ("soften", 2)]]
FENCES = [(f, "fence_async_shared", 0) for f in ("dequantise", "soften")]


@runs_source
@pytest.mark.parametrize("without", WAITS + FENCES, ids=lambda w: f"{w[0]}-{w[1]}-{w[2]}")
def test_no_wait_or_fence_is_too_many(without: tuple[str, str, int]) -> None:
    """Without any of them some order of events goes wrong: so this device sees what they are for."""
    e = example(1, 5 * KEYS, 16, FLASH)
    want = launch(e, 2560)

    def fails(seed: int) -> bool:
        try:
            return not torch.equal(launch(e, 2560, seed, without), want)
        except AssertionError:
            return True

    assert any(fails(seed) for seed in range(40))


def test_only_its_own_rows() -> None:
    assert not is_v4(kv_fp8_v41(64)) and not is_v4(kv_fp8(64, 48, 16))


@pytest.mark.parametrize(("heads", "columns"), [(64, 640), (64, 256), (64, 1152), (64, 8320), (16, 640)])
def test_moves_little_more_than_it_must(heads: int, columns: int) -> None:
    pool = Pages.empty(1, FLASH)
    for rope in (0, 64):
        have, least = moved([columns] * 4, heads, rope=rope).total, least_bytes(4, columns, heads, pool, rope=rope)
        assert least <= have <= 1.3 * least


def test_two_blocks_of_heads_read_rows_twice() -> None:
    """V4-Pro. The second reading is of what the first brought into the L2 cache."""
    pool, once = Pages.empty(1, FLASH), 1152 * FLASH.row_bytes
    assert moved([1152], 128).total - once <= 1.3 * least_bytes(1, 1152, 128, pool)


@needs_gluon
def test_a_tile_is_its_chunks() -> None:
    """The kernel sees one memory as tiles of 64 x 512, as chunks of 64 and 128 channels and as raw bytes."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    def places(bits: int, line: int, columns: int) -> list[tuple[int, int]]:
        view = NVMMASharedLayout(line, bits, rank=2).format_hardware_view([KEYS, columns])
        return [(int(a), int(b)) for a, b in re.findall(r"-> \( *(\d+), *(\d+)\)", view)]

    chunk, tile = places(16, 128, 64), places(16, 128, DIM)
    assert tile == [(row, 64 * part + column) for part in range(8) for row, column in chunk]
    assert places(16, 128, 128) == tile[: 2 * len(chunk)]
    raw = places(8, 128, 128)
    assert len(raw) == 2 * len(chunk)
    # A row stays in its 128 bytes, so rows that gather4 brings four at a time lie one behind the other.
    assert all(row == place // 128 for place, (row, _) in enumerate(raw))
    assert all(row == place // 64 for place, (row, _) in enumerate(places(8, 64, 64)))


@needs_gluon
def test_launches_what_was_compiled() -> None:
    e = example(2, 70, 16, FLASH)
    signature = next(case for case in aot() if case.name.endswith("float16")).signature
    assert [d.__mangle__() for d in _descriptors(e.q, e.pool)] == list(signature.values())[:4]


COMPILE = """
import sys
from weft.kernels.gpu.aot import compile_case
from weft.kernels.triton.attention_sm100 import aot
case = next(c for c in aot() if c.name.endswith(sys.argv[1]))
made = compile_case(case, "sm100")
boxes = made.ptx.count("tile::gather4"), made.ptx.count("tcgen05.mma"), "36864" in made.ptx
print(made.faults(case), made.registers, made.shared, made.tmem, *boxes, flush=True)
"""


@needs_gluon
@pytest.mark.parametrize(
    "name",
    ["float16", pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("256", marks=pytest.mark.slow)],
)
def test_compiles_for_blackwell(name: str) -> None:
    """16 transfers of 4 rows for each of 5 boxes; 32 steps of logits and 4 * 4 of sums; no spills, no trap."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    faults, rest = done.stdout.rsplit("]", 1)
    registers, shared, tmem, gathers, products, whole = rest.split()
    assert faults == "[", faults
    assert (int(registers), int(gathers), int(products), whole) == (128, 80, 48, "True")
    assert int(shared) < 208_000 and int(tmem) <= 512
