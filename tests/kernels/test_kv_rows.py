"""Stored rows: a row's bytes apart from what is stored with it and where. Formats: tests/model/test_formats.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.kernels import same_bits
from weft.kernels.kv_rows import DenseRows, PagedRows, Rows
from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8, kv_fp4_v41, kv_fp8, kv_fp8_v41

ROWS, PAGE = 120, 8


def paged(layout: RowLayout) -> PagedRows:
    return PagedRows(ROWS // PAGE + 1, layout)


MAKERS: dict[str, tuple[int, Callable[[], Rows]]] = {
    "float32": (64, lambda: DenseRows(torch.zeros(ROWS + PAGE, 64))),
    "bfloat16": (64, lambda: DenseRows(torch.zeros(ROWS + PAGE, 64).bfloat16())),
    "fp8": (64, lambda: paged(kv_fp8(PAGE, 48, 16))),
    "fp8 of the released model": (512, lambda: paged(kv_fp8(PAGE, 448, 64))),
    "fp8 of V4.1": (512, lambda: paged(kv_fp8_v41(PAGE))),
    "fp4 of V4.1": (512, lambda: paged(kv_fp4_v41(PAGE))),
    "fp8 keys": (32, lambda: paged(keys_fp8(PAGE, 32))),
    "fp4 keys": (128, lambda: paged(keys_fp4(PAGE, 128))),
}


def values(width: int) -> Tensor:
    return torch.randn(ROWS, width) * 2.0 ** torch.randint(-10, 10, (ROWS, 1))


@pytest.mark.parametrize("name", MAKERS)
def test_rows_stored_alone_or_together_anywhere(name: str) -> None:
    width, make = MAKERS[name]
    x = values(width)
    place = torch.randperm(ROWS) + PAGE
    together, alone, elsewhere = make(), make(), make()
    together.store(place, x)
    for i in range(ROWS):
        alone.store(place[i : i + 1], x[i : i + 1].clone())
    elsewhere.store(torch.arange(PAGE, ROWS + PAGE), x)
    got = together.gather(place)
    assert got.dtype == torch.float32
    assert same_bits(alone.gather(place), got)
    assert same_bits(elsewhere.gather(torch.arange(PAGE, ROWS + PAGE)), got)


@pytest.mark.parametrize("name", MAKERS)
def test_reading_order_and_count_do_not_matter(name: str) -> None:
    width, make = MAKERS[name]
    rows = make()
    rows.store(torch.arange(PAGE, ROWS + PAGE), values(width))
    whole = rows.gather(torch.arange(ROWS + PAGE))
    index = torch.randint(0, ROWS + PAGE, (501,))
    assert same_bits(rows.gather(index), whole[index])
    for i in (0, 3, PAGE, 77):
        assert same_bits(rows.gather(torch.tensor([i])), whole[i : i + 1])
    assert rows.gather(torch.empty(0, dtype=torch.int64)).shape == (0, width)


@pytest.mark.parametrize("name", MAKERS)
def test_storing_leaves_other_rows_and_the_input_alone(name: str) -> None:
    width, make = MAKERS[name]
    rows, x = make(), values(width)
    rows.store(torch.arange(PAGE, ROWS + PAGE), x)
    kept, before = rows.gather(torch.arange(ROWS + PAGE)), x.clone()
    rows.store(torch.tensor([50, 60]), x[:2])
    others = [i for i in range(ROWS + PAGE) if i not in (50, 60)]
    assert same_bits(rows.gather(torch.tensor(others)), kept[others])
    assert same_bits(rows.gather(torch.tensor([50, 60])), kept[PAGE : PAGE + 2])
    assert same_bits(x, before)
    assert not rows.gather(torch.zeros(1, dtype=torch.int64)).any()
