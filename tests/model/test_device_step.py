"""Index tensors on the device, beside the host's: the same rows, whatever the sequences' lengths and pages."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from support.device import DEVICE, config_of
from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda.packed import move
from weft.runtime.model.cuda.step import DeviceStep, Keys

CONFIG = config_of(0)
KINDS = ("window", "c4a", "c128a")


def step_of(lengths: list[tuple[int, int]], page: int) -> DeviceStep:
    """A step over sequences of (tokens computed, tokens now)."""
    total = sum(a + b for a, b in lengths)
    sizes = PoolSizes(tokens=total + 2000, slots=len(lengths), context=1200, burst=total, page=page)
    pools = DevicePools(CONFIG, sizes, torch.float32, kv_format="fp8", index_format="fp4", device=DEVICE)
    states = [SequenceState(pools) for _ in lengths]
    spans: list[Span] = []
    for state, (before, now) in zip(states, lengths, strict=True):
        if before:
            state.reserve(before)
            state.commit(before)
        state.reserve(now)
        spans.append(state.span(now))
    batch = Batch(pools, spans)
    return DeviceStep(batch, torch.arange(batch.tokens), Rope(CONFIG, DEVICE), KINDS)


def listed(keys: Keys) -> list[list[int]]:
    """The rows of each query, by column."""
    index, lengths = keys.index.tolist(), keys.lengths.tolist()
    return [[row for row in own[:length] if row >= 0] for own, length in zip(index, lengths, strict=True)]


def of_host(index: np.ndarray) -> list[list[int]]:
    return [[row for row in own if row > 0] for own in index.tolist()]


LENGTHS = [[(0, 1)], [(0, 5), (31, 1), (127, 2)], [(500, 3), (0, 40), (255, 130)], [(3, 1), (700, 1), (31, 1)]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("page", [1, 7, 64])
def test_queries_list_the_rows_that_they_list_on_the_host(lengths: list[tuple[int, int]], page: int) -> None:
    step = step_of(lengths, page)
    batch = step.batch
    assert listed(step.window_keys) == of_host(batch.window_index)
    c128 = batch.c128_keys.index.numpy().reshape(batch.tokens, -1)
    assert listed(step.c128_keys) == of_host(c128)
    k = CONFIG.index_topk
    first = np.minimum(np.arange(k), batch.c4_visible[:, None])  # of those that see more, the indexer chooses
    entries = np.where(first < batch.c4_visible[:, None], first, -1)
    c4 = batch.c4_keys(entries).index.numpy().reshape(batch.tokens, -1)
    assert listed(step.c4_keys) == of_host(c4)


@pytest.mark.parametrize("page", [1, 7, 64])
def test_a_query_has_the_same_list_in_every_step(page: int) -> None:
    """Columns too: what a kernel adds, and in which order, depends on the position alone."""
    whole = step_of([(0, 300)], page)
    parts = step_of([(0, 300)], page)
    parts.batch = Batch(whole.pools, [Span(0, 200, 100)])
    later = DeviceStep(parts.batch, torch.arange(100), Rope(CONFIG, DEVICE), KINDS)
    for name in ("window_keys", "c4_keys", "c128_keys"):
        a, b = getattr(whole, name), getattr(later, name)
        assert torch.equal(a.lengths[200:], b.lengths)
        width = min(a.index.shape[1], b.index.shape[1])
        assert torch.equal(a.index[200:, :width], b.index[:, :width]), name


def test_plans_say_what_the_batch_says() -> None:
    step = step_of([(126, 131), (2, 1), (0, 1)], 16)
    batch = step.batch
    plan, done = step.c4_plan, batch.c4_pooling
    assert plan.entries.tolist() == [0, 33, 33, 33]
    assert plan.number.tolist() == done.entry.tolist()
    assert (plan.target.cpu().numpy() - plan.key_target.cpu().numpy() == batch.pools.base["c4"]).all()
    assert step.c128_plan.number.tolist() == [0, 1]
    assert step.c128_plan.target.tolist() == (batch.c128_pooling.target + batch.pools.base["c128"]).tolist()


def test_moved_arrays_are_aligned_and_whole() -> None:
    rng = random.Random(0)
    arrays = {str(i): np.random.randint(-9, 9, (rng.randint(0, 5), rng.randint(1, 3))) for i in range(20)}
    moved = move(arrays, torch.device(DEVICE))
    for name, array in arrays.items():
        tensor: Tensor = moved[name]
        assert tensor.dtype == torch.int32 and tensor.tolist() == array.tolist()
        assert tensor.numel() == 0 or tensor.data_ptr() % 16 == 0
    with pytest.raises(AssertionError):
        move({"far": np.array([1 << 31])}, torch.device(DEVICE))
