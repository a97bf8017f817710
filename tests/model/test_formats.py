"""KV stored in the released byte layouts: what is read back, and that pages and chunks change nothing."""

import itertools

import pytest
import torch

from support import draw
from support.run import pools_for, step
from weft.kernels.kv_rows import DenseRows, PagedRows
from weft.kernels.layouts import keys_fp4, keys_fp8, kv_fp4_v41, kv_fp8, kv_fp8_v41
from weft.kernels.quant import simulate_fp4, simulate_fp8_
from weft.runtime.cache.capacity import IndexFormat, KvFormat
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import preset
from weft.runtime.model.model import Model

NOPE, ROPE, KEY = 448, 64, 128


def logits(
    model: Model, ids: list[int], chunks: tuple[int, ...], page: int, kv: KvFormat, index: IndexFormat
) -> torch.Tensor:
    state = SequenceState(pools_for(model, [ids], page, kv, index))
    out, start = [], 0
    for size in itertools.cycle(chunks):
        if start == len(ids):
            return model.logits(torch.cat(out))
        out += step(model, [(state, ids[start : start + size])])
        start = state.length
    raise AssertionError


def values(rows: int, width: int) -> torch.Tensor:
    """Rows of very different size, one of zeros."""
    x = torch.randn(rows, width) * 2.0 ** torch.randint(-12, 5, (rows, 1))
    x[0] = 0
    return x


def test_a_row_takes_the_published_bytes() -> None:
    assert PagedRows(1, kv_fp8(64, NOPE, ROPE)).nbytes == 37440  # 64 * 584 padded to a multiple of 576
    assert PagedRows(1, kv_fp8(2, NOPE, ROPE)).nbytes == 1728
    assert PagedRows(1, keys_fp8(64, KEY)).nbytes == 64 * 132
    assert PagedRows(1, keys_fp4(64, KEY)).nbytes == 64 * 68
    assert kv_fp8_v41(64).row_bytes == 528
    assert kv_fp4_v41(64).row_bytes == 288


@pytest.mark.parametrize("page", [1, 2, 7, 64])
def test_fp8_rows_read_back_as_the_simulation_rounds(page: int) -> None:
    rows = PagedRows(1 + -(-40 // page), kv_fp8(page, NOPE, ROPE))
    index = page + torch.randperm(40)
    x = values(40, NOPE + ROPE)
    rows.store(index, x)
    expected = simulate_fp8_(x.clone(), NOPE)
    expected[:, NOPE:] = expected[:, NOPE:].bfloat16().float()
    assert torch.equal(rows.gather(index), expected)
    assert not rows.gather(torch.zeros(3, dtype=torch.int64)).any(), "the null row is zeros"


def test_fp4_keys_read_back_as_the_simulation_rounds() -> None:
    keys = PagedRows(3, keys_fp4(32, KEY))
    index = 32 + torch.randperm(64)
    x = values(64, KEY)
    keys.store(index, x)
    assert torch.equal(keys.gather(index), simulate_fp4(x))


def test_fp8_keys_are_close() -> None:
    keys = PagedRows(3, keys_fp8(32, KEY))
    index = 32 + torch.randperm(64)
    x = values(64, KEY)
    keys.store(index, x)
    error = (keys.gather(index) - x).abs()
    top = x.abs().amax(1, keepdim=True).clamp_min(1e-4)
    assert (error <= torch.maximum(x.abs() / 16, top / 448 * 2**-9)).all()


def test_rows_of_v41_are_close() -> None:
    """e4m3 keeps 3 bits behind the leading one; e2m1 one, and its e4m3 scale three: half a step of the largest."""
    x = values(64, 512).clamp(-400, 400)
    for layout, part in ((kv_fp8_v41(32), 2.0**-4), (kv_fp4_v41(32), 1 / 6 + 2.0**-4)):
        rows = PagedRows(3, layout)
        rows.store(torch.arange(32, 96), x)
        grouped = x.unflatten(1, (-1, layout.group))
        least = 6 * 2.0**-6 if layout.scales == "e4m3" else layout.least  # below, scales are subnormal
        top = grouped.abs().amax(2, keepdim=True).clamp_min(least).expand_as(grouped).flatten(1)
        assert ((rows.gather(torch.arange(32, 96)) - x).abs() <= part * top).all()


def test_the_page_layout_is_data_then_scales() -> None:
    """Row i: data at i * 576, scales at page * 576 + i * 8 (the address arithmetic of the GPU kernels)."""
    rows = PagedRows(2, kv_fp8(4, NOPE, ROPE))
    x = values(4, NOPE + ROPE)
    rows.store(torch.arange(4, 8), x)
    page = rows.bytes[1]
    for i in range(1, 4):
        data = page[i * 576 : (i + 1) * 576]
        scales = page[4 * 576 + i * 8 : 4 * 576 + i * 8 + 8]
        factor = (2.0 ** (scales[:7].float() - 127)).repeat_interleave(64)
        nope = data[:NOPE].view(torch.float8_e4m3fn).float() * factor
        rope = data[NOPE:].contiguous().view(torch.bfloat16).float()
        assert torch.equal(torch.cat((nope, rope)), rows.gather(torch.tensor([4 + i]))[0])
        assert scales[7] == 0


def test_copying_a_page_copies_every_format() -> None:
    x = values(4, 64)
    layouts = (kv_fp8(4, 48, 16), keys_fp8(4, 64), keys_fp4(4, 64), kv_fp8_v41(4, 64), kv_fp4_v41(4, 64))
    for rows in (DenseRows(torch.zeros(12, 64)), *(PagedRows(3, layout) for layout in layouts)):
        rows.store(torch.arange(4, 8), x)
        rows.copy_pages(torch.tensor([1]), torch.tensor([2]), 4)
        assert torch.equal(rows.gather(torch.arange(8, 12)), rows.gather(torch.arange(4, 8)))
        assert rows.gather(torch.arange(4, 8)).any()


@pytest.mark.parametrize("page", [1, 5, 64])
def test_packed_pools_give_the_bits_of_the_simulation(page: int) -> None:
    """bfloat16 rows hold what FP8 rows decode to, so a model that rounds anyway cannot tell the pools apart."""
    config = preset("tiny")
    model = Model(config, draw.random_weights(config, 0), dtype=torch.bfloat16, quant_sim=True)
    ids = torch.randint(0, config.vocab_size, (300,)).tolist()
    dense = logits(model, ids, (300,), 16, "model", "model")
    assert torch.equal(logits(model, ids, (64, 1, 100), page, "fp8", "fp4"), dense)


@pytest.mark.parametrize("index", ["fp8", "fp4"])
def test_packed_pools_do_not_depend_on_chunks(index: IndexFormat) -> None:
    config = preset("tiny")
    model = Model(config, draw.random_weights(config, 1), quant_sim=True)
    ids = torch.randint(0, config.vocab_size, (300,)).tolist()
    whole = logits(model, ids, (300,), 16, "fp8", index)
    assert torch.equal(logits(model, ids, (3, 50, 129), 7, "fp8", index), whole)
