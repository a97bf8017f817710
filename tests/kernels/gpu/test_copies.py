"""Copies of pages and slots: exactly the bytes named, in every tensor, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.kernels.gpu.copies import PageTable, SlotTable, copy_pages, copy_slots, least_bytes
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.layouts import keys_fp4, keys_fp8, kv_fp8
from weft.kernels.reference.copies import example, example_slots

each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def pools(sizes: list[int], pages: int, device: str) -> list[Tensor]:
    return [torch.randint(0, 256, (pages, size), dtype=torch.uint8, device=device) for size in sizes]


def numbers(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def copied(tensor: Tensor, source: list[int], target: list[int]) -> Tensor:
    want = tensor.clone()
    for old, new in zip(source, target, strict=True):
        if old >= 0 and new >= 0:
            want[new] = tensor[old]
    return want


@each_implementation
@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ([37440, 8448, 4352], 16),
        ([16], 16),
        ([16400, 16], 16),
        ([96, 8], 8),
        ([100, 20000, 4], 4),
        ([90, 2], 2),
        ([33, 1, 9001], 1),
    ],
)
def test_pages(sizes: list[int], word: int, implementation: str, device: str) -> None:
    """A source twice, pages that are none, and lengths on both sides of a program's chunk."""
    tensors = pools(sizes, 7, device)
    table = PageTable.of(tensors)
    assert word % table.word == 0  # what the allocations' alignment leaves of it
    source, target = [1, 1, -1, 6, 5], [2, 3, 4, -1, 0]
    want = [copied(tensor, source, target) for tensor in tensors]
    copy_pages(table, numbers(source, device), numbers(target, device), implementation=implementation)
    assert all(torch.equal(got, exact) for got, exact in zip(tensors, want, strict=True))


@each_implementation
def test_pages_of_layouts_that_begin_inside_a_pool(implementation: str, device: str) -> None:
    """Compressed pages stand behind the window's in the same tensor."""
    kv = [torch.randint(0, 256, (9, kv_fp8(8, 48, 16).page_bytes), dtype=torch.uint8, device=device) for _ in "ab"]
    keys = [torch.randint(0, 256, (6, form(8, 32).page_bytes), dtype=torch.uint8, device=device)
            for form in (keys_fp8, keys_fp4)]  # fmt: skip
    want = [copied(tensor, [3 + 2], [3 + 4]) for tensor in kv] + [copied(tensor, [2], [4]) for tensor in keys]
    table = PageTable.of([tensor[3:] for tensor in kv] + keys)
    copy_pages(table, numbers([2], device), numbers([4], device), implementation=implementation)
    assert all(torch.equal(got, exact) for got, exact in zip(kv + keys, want, strict=True))


@each_implementation
@pytest.mark.parametrize(("c4", "c128"), [(2, 1), (0, 2), (1, 0), (0, 0)])
def test_slots(c4: int, c128: int, implementation: str, device: str) -> None:
    """One sequence forked into two, another saved; whatever layers there are."""
    tail, fold = torch.randn(c4, 6, 8, 24, device=device), torch.randn(c128, 6, 3, 10, device=device)
    streams = torch.randn(6, 4, 12, device=device).bfloat16()
    source, target = [0, 0, 3], [1, 2, 5]
    want = [*(copied(x, source, target) for x in (*tail, *fold)), copied(streams, source, target)]
    table = SlotTable.of_state(tail, fold, streams)
    copy_slots(table, numbers(source, device), numbers(target, device), implementation=implementation)
    assert all(torch.equal(got, exact) for got, exact in zip((*tail, *fold, streams), want, strict=True))


def test_nothing_to_copy(device: str) -> None:
    tensors = pools([48], 3, device)
    kept = tensors[0].clone()
    copy_pages(PageTable.of(tensors), numbers([], device), numbers([], device))
    copy_pages(PageTable.of(tensors), numbers([-1, 2], device), numbers([1, -1], device))
    assert torch.equal(tensors[0], kept)


def test_tensors_of_other_strides(device: str) -> None:
    """A page is contiguous, pages need not stand side by side."""
    wide = torch.randint(0, 256, (5, 64), dtype=torch.uint8, device=device)
    want = copied(wide, [1], [3])
    want[:, 48:] = wide[:, 48:]
    copy_pages(PageTable.of([wide[:, :48]]), numbers([1], device), numbers([3], device), implementation="triton")
    assert torch.equal(wide, want)
    with pytest.raises(AssertionError, match="contiguous"):
        PageTable.of([wide.T])


def test_at_the_models_sizes_and_bytes_moved(device: str) -> None:
    for given, copy in ((example(2, device, layers=3), copy_pages), (example_slots(1, device), copy_slots)):
        table = given.get("pools") or given["state"]
        want = [copied(x, given["source"].tolist(), given["target"].tolist()) for x in table.tensors]
        assert device == "cuda" or table.word == 16
        with traffic() as moved:
            copy(**given, implementation="triton")
        assert all(torch.equal(got, exact) for got, exact in zip(table.tensors, want, strict=True))
        copies = given["source"].numel()
        assert device == "cuda" or 2 * copies * table.nbytes <= moved.total <= 1.3 * least_bytes(table, copies)
