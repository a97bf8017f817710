"""Index tensors on the device, beside the host's: the same rows, whatever the sequences' lengths and pages."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from support.device import DEVICE, config_of, references
from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda import shape as shapes
from weft.runtime.model.cuda.packed import Packed
from weft.runtime.model.cuda.shape import StepShape
from weft.runtime.model.cuda.step import DeviceStep, Keys, host_input

CONFIG = config_of(0)
KINDS = ("window", "c4a", "c128a")


@pytest.fixture(autouse=True, scope="module")
def ops() -> Iterator[None]:
    with references():
        yield


def batch_of(lengths: list[tuple[int, int]], page: int, *, drafts: bool = False) -> Batch:
    """Sequences of (tokens computed, tokens now)."""
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
    return Batch(pools, spans, drafts=drafts)


def step_of(batch: Batch, shape: StepShape | None = None) -> DeviceStep:
    """A step of a batch, as large as it is or of a padded shape."""
    ids, rope = torch.arange(batch.tokens), Rope(CONFIG, DEVICE)
    if shape is None:
        return DeviceStep.of(batch, ids, rope, KINDS)
    assert isinstance(batch.pools, DevicePools)
    return DeviceStep(shape, host_input(batch, ids, shape).to(DEVICE), batch.pools, rope)


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
    batch = batch_of(lengths, page)
    step = step_of(batch)
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
    batch = batch_of([(0, 300)], page)
    whole, later = step_of(batch), step_of(Batch(batch.pools, [Span(0, 200, 100)]))
    for name in ("window_keys", "c4_keys", "c128_keys"):
        a, b = getattr(whole, name), getattr(later, name)
        assert torch.equal(a.lengths[200:], b.lengths)
        width = min(a.index.shape[1], b.index.shape[1])
        assert torch.equal(a.index[200:, :width], b.index[:, :width]), name


def test_plans_say_what_the_batch_says() -> None:
    batch = batch_of([(126, 131), (2, 1), (0, 1)], 16)
    step = step_of(batch)
    plan, done = step.c4_plan, batch.c4_pooling
    assert plan.entries.tolist() == [0, 33, 33, 33]
    assert plan.number.tolist() == done.entry.tolist()
    assert (plan.target.cpu().numpy() - plan.key_target.cpu().numpy() == batch.pools.base["c4"]).all()
    assert step.c128_plan.number.tolist() == [0, 1]
    assert step.c128_plan.target.tolist() == (batch.c128_pooling.target + batch.pools.base["c128"]).tolist()


DECODES = [
    [(0, 1)],
    [(130, 1), (0, 1), (700, 1)],
    [(3, 1), (31, 2), (127, 4), (1000, 3), (8, 1)],
]


@pytest.mark.parametrize("lengths", DECODES)
@pytest.mark.parametrize("page", [1, 7, 64])
def test_padding_changes_no_row(lengths: list[tuple[int, int]], page: int) -> None:
    """What a padded step says of its tokens, sequences and entries is what the exact one says; the rest is
    empty."""
    batch = batch_of(lengths, page, drafts=True)
    shape = shapes.padded(batch, KINDS)
    assert shape is not None
    tokens, sequences = batch.tokens, len(lengths)
    assert shape.tokens >= tokens and shape.sequences >= sequences and shape.gathered is None
    step, own = step_of(batch, shape), step_of(batch)
    for name in ("ids", "position", "sequence", "window_rows", "c4_visible", "plain", "compressed"):
        assert torch.equal(getattr(step, name)[:tokens], getattr(own, name)), name
    for name in ("window_keys", "c4_keys", "c128_keys"):
        a, b = getattr(step, name), getattr(own, name)
        assert torch.equal(a.lengths[:tokens], b.lengths) and not a.lengths[tokens:].any(), name
        width = b.index.shape[1]
        assert torch.equal(a.index[:tokens, :width], b.index) and (a.index[:tokens, width:] == -1).all(), name
        assert (a.index[tokens:] == -1).all(), name
    assert torch.equal(step.last[:sequences], own.last) and (step.last[sequences:] == -1).all()
    assert (step.ids[tokens:] == -1).all() and (step.window_rows[tokens:] == -1).all()
    for name in ("c4_plan", "c128_plan"):
        a, b = getattr(step, name), getattr(own, name)
        many = len(b.sequence)
        for part in ("start", "count", "offset", "slot"):
            assert torch.equal(getattr(a, part)[:sequences], getattr(b, part)), part
        assert torch.equal(a.entries[: sequences + 1], b.entries) and (a.entries[sequences:] == many).all()
        assert not a.count[sequences:].any() and (a.sequence[many:] == -1).all()
        for part in ("sequence", "number", "target"):
            assert torch.equal(getattr(a, part)[:many], getattr(b, part)), part
    assert torch.equal(step.c4_entries[: len(own.c4_plan.sequence)], own.c4_entries)
    assert step.folds == {} and step.behind(0, 8) is not None


def test_few_shapes_hold_many_steps() -> None:
    """Decode steps of 1 to 64 sequences while a context grows twice as long; and what is not padded."""
    found = set()
    for sequences in (1, 2, 3, 7, 16, 20, 33, 49, 64):
        for before in (33, 50, 63):
            found.add(shapes.padded(batch_of([(before, 1)] * sequences, 16), KINDS))
    assert None not in found and len(found) == 9
    assert {shape.sequences for shape in found if shape} == {1, 2, 3, 7, 16, 20, 40, 56, 64}
    assert shapes.padded(batch_of([(5, 9), (3, 1)], 16), KINDS) is None
    window = shapes.padded(batch_of([(5, 1), (3, 1)], 16), ("window",))
    assert window is not None and window.c4_pages == window.c128_entries == window.columns == 0


def test_the_indexer_is_left_out_while_every_entry_is_chosen() -> None:
    k = CONFIG.index_topk
    for before, chooses in ((4 * k - 1, False), (4 * k, True)):
        shape = shapes.padded(batch_of([(before, 1), (0, 1)], 16), KINDS)
        assert shape is not None and (shape.visible > k) == chooses


def test_rows_that_are_not_reserved_are_refused() -> None:
    batch = batch_of([(40, 1)], 16)
    beyond = Batch(batch.pools, [Span(0, 64, 1)])
    with pytest.raises(AssertionError, match="not reserved"):
        step_of(beyond)


def test_packed_arrays_are_aligned_and_whole() -> None:
    rng = random.Random(0)
    arrays = {str(i): np.random.randint(-9, 9, (rng.randint(0, 5), rng.randint(1, 3))) for i in range(20)}
    packed = Packed({name: array.shape for name, array in arrays.items()})
    host = packed.host(torch.device(DEVICE))
    for name, array in packed.arrays(host).items():
        array[:] = arrays[name]
    for name, tensor in packed.tensors(host.to(DEVICE)).items():
        assert tensor.dtype == torch.int32 and tensor.tolist() == arrays[name].tolist()
        assert tensor.numel() == 0 or tensor.data_ptr() % 16 == 0
