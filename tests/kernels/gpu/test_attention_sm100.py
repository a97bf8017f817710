"""Sparse decode for Blackwell, without one: a model of its arithmetic, bytes, layouts, and what it compiles to.

The model repeats the kernel step by step in torch: its addresses in the byte pool, its tiles and their order, its
types, when it rescales, its splits; the splits are merged by the kernel's own merge.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from weft.kernels.gpu.attention import least_bytes
from weft.kernels.gpu.base import Pages
from weft.kernels.layouts import kv_fp8, kv_fp8_v41
from weft.kernels.reference.attention import Example, example
from weft.kernels.reference.attention import sparse_attention as reference
from weft.kernels.reference.rows import gather, store
from weft.kernels.triton.attention_sm100 import DATA, DIM, KEYS, LOG2E, SLACK, available, moved, supports

FLASH = kv_fp8(64, 448, 64)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
needs_gluon = pytest.mark.skipif(not available(), reason="the kernel is written in the Gluon of Triton 3.9")


def fetched(pool: Pages, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fetch`: codes [N, 448] u8, channels [N, 64] bf16, scale words [N] i64 of rows; -1: row 0 and no scale."""
    page, pitch = pool.layout.page, pool.layout.page_bytes // DATA
    row = rows.clamp_min(0).long()
    lines = pool.bytes.view(-1, DATA)[row // page * pitch + row % page]
    word = row // page * (pitch * 72) + page * 72 + row % page
    words = torch.where(rows >= 0, pool.bytes.view(torch.int64).flatten()[word], 0)
    return lines[:, :448], lines.view(torch.bfloat16)[:, 224:], words


def dequantised(pool: Pages, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantise`: [N, 512] of the products' type, every step in it."""
    codes, plain, words = fetched(pool, rows)
    exponent = (words[:, None] >> (8 * torch.arange(7, device=words.device)) & 255).to(torch.int32)
    if dtype == torch.float16:
        factor = (exponent << 23).view(torch.float32).to(dtype)
    else:
        factor = (exponent << 7).to(torch.int16).view(dtype)
    value = codes.view(torch.float8_e4m3fn).to(dtype).view(-1, 7, 64) * factor[:, :, None]
    return torch.cat((value.flatten(1), plain.float().to(dtype)), 1)


class Softened:
    """One split of one query: `soften` and `multiply`."""

    def __init__(self, q: Tensor, pool: Pages, columns: Tensor, scale: float) -> None:
        heads, dtype = len(q), q.dtype
        self.top = torch.full((heads,), -torch.inf, device=q.device)
        self.total = torch.zeros(heads, device=q.device)
        self.sums = torch.zeros(DIM, heads, device=q.device)
        self.rescaled = 0
        for number, rows in enumerate(columns.split(KEYS)):
            rows = torch.nn.functional.pad(rows, (0, KEYS - len(rows)), value=-1)
            keys = dequantised(pool, rows, dtype).float()
            logit = torch.where(rows >= 0, q.float() @ keys.T * (scale * LOG2E), -torch.inf)
            highest = logit.max(1).values
            outgrown = highest > self.top + SLACK
            higher = torch.where(outgrown, highest, self.top)
            base = torch.where(higher == -torch.inf, 0.0, higher)
            decay = torch.exp2(self.top - base)
            weight = torch.exp2(logit - base[:, None]).to(dtype).float()
            self.total = self.total * decay + weight.sum(1)
            self.top = higher
            if number and outgrown.any():
                self.sums *= decay
                self.rescaled += 1
            self.sums += keys.T @ weight.T


def model(e: Example, split: int) -> tuple[Tensor, int]:
    """[T, H, 512] float32, and how often sums were rescaled."""
    from weft.kernels.triton.attention import merge

    tokens, heads, _ = e.q.shape
    splits = max(1, -(-e.index.shape[1] // split))
    out = torch.full(e.q.shape, torch.nan, device=e.q.device)
    parts = torch.full((tokens, splits, heads, DIM), torch.nan, device=e.q.device)
    tops, totals = torch.full((2, tokens, splits, heads), torch.nan, device=e.q.device)
    rescaled = 0
    for token, length in enumerate(e.lengths.tolist()):
        for number in range(max(1, -(-length // split))):
            columns = e.index[token, number * split : min(length, (number + 1) * split)]
            done = Softened(e.q[token], e.pool, columns, e.scale)
            rescaled += done.rescaled
            if length > split:
                parts[token, number], tops[token, number], totals[token, number] = (
                    done.sums.T,
                    done.top,
                    done.total,
                )
                continue
            highest = torch.maximum(done.top, e.sink * LOG2E)
            share = torch.exp2(done.top - highest)
            factor = share / (done.total * share + torch.exp2(e.sink * LOG2E - highest))
            out[token] = (done.sums * torch.where(done.total > 0, factor, 0.0)).T
    if splits > 1:
        merge[tokens, heads](out, parts, tops, totals, e.lengths, e.sink, heads, splits, split, DIM, DIM)
    return out, rescaled


def check(e: Example, split: int) -> int:
    """The products' type rounds the weights, and float16 also the bfloat16 channels, by its unit u at most; q is
    exact, and so are codes times scales, in float16 to 2^-25. A row rounded so moves a logit by scale * sum |q|
    (u |k| + 2^-25) at most, float32 sums of 512 terms by 2^-15 scale * sum |q| |k|; a weight moves by e^that and u,
    and below 2^-14 (float16) by 2^-25 of the largest. Weights sum to 1 at most, so the output moves by that share
    of the largest row, twice (numerator and denominator), and by float32's sums over the columns."""
    out, rescaled = model(e, split)
    want = reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
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
    return rescaled


@pytest.mark.parametrize("page", [1, 2, 64, 256])
@pytest.mark.parametrize("dtype", UNIT)
def test_rows_come_from_where_they_are(page: int, dtype: torch.dtype, device: str) -> None:
    """First and last rows of pages; magnitudes of 2^-9 to 2^6, so scales down to 2^-19."""
    layout = kv_fp8(page, 448, 64)
    assert supports(layout)
    pool = Pages.empty(5, layout, device)
    rows = torch.arange(page, 5 * page, dtype=torch.int32, device=device)
    rows = rows[(rows % page < 2) | (rows % page >= page - 2)]
    size = 2.0 ** torch.randint(-9, 7, (len(rows), 1), device=device)
    store(pool, rows, torch.randn(len(rows), DIM, device=device) * size)
    rows = torch.cat((rows, rows.new_tensor([-1])))
    have, want = dequantised(pool, rows, dtype).double(), gather(pool, rows)
    if dtype == torch.bfloat16:
        assert torch.equal(have, want)
    assert ((have - want)[:, :448].abs() <= 2.0**-25).all()
    assert ((have - want)[:, 448:].abs() <= want[:, 448:].abs() * UNIT[dtype] + 2.0**-25).all()


def test_only_its_own_rows() -> None:
    assert not supports(kv_fp8_v41(64)) and not supports(kv_fp8(64, 48, 16))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("heads", [16, 64])
def test_the_model_equals_the_reference(heads: int, dtype: torch.dtype, device: str) -> None:
    """Lengths around tiles and splits; -1 at the front, in between, throughout; columns that must not be read."""
    e = example(9, 330, heads, FLASH, device=device, dtype=dtype)
    e.lengths[:] = torch.tensor([330, 0, 1, 63, 64, 65, 128, 129, 330])
    e.index[5, 65:] = 1 << 30
    e.index[0, ::3] = -1
    e.index[3, :10] = -1
    e.index[6] = -1
    e.index[8, :200] = -1
    check(e, split=128)


def test_one_split_at_full_width(device: str) -> None:
    check(example(1, 640, 64, FLASH, device=device, dtype=torch.bfloat16), split=2560)


@pytest.mark.parametrize("dtype", UNIT)
def test_logits_that_grow_rescale(dtype: torch.dtype, device: str) -> None:
    """Each tile's rows are twice as large as the last one's: bases are outgrown, early sums nearly vanish."""
    e = example(2, 320, 16, FLASH, device=device, dtype=dtype)
    values = (
        torch.randn(640, DIM, device=device) * 2.0 ** (torch.arange(640, device=device) % 320 // KEYS)[:, None]
    )
    store(e.pool, e.index.flatten(), values)
    assert check(e, split=2560) > 0


def test_a_query_is_its_own(device: str) -> None:
    e = example(4, 150, 16, FLASH, device=device)
    whole, _ = model(e, 64)
    for token in (0, 3):
        part = slice(token, token + 1)
        one = Example(e.q[part], e.pool, e.index[part], e.lengths[part], e.sink, e.scale)
        assert torch.equal(model(one, 64)[0], whole[part])


@pytest.mark.parametrize(("heads", "columns"), [(64, 640), (64, 256), (64, 1152), (64, 8320), (16, 640)])
def test_moves_little_more_than_it_must(heads: int, columns: int) -> None:
    pool = Pages.empty(1, FLASH)
    have = moved([columns] * 4, heads).total
    assert least_bytes(4, columns, heads, pool) <= have <= 1.3 * least_bytes(4, columns, heads, pool)


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
