"""One sequence's pages: what is reserved, shared, copied and given back, and when."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from support.engine import free, small_config, small_model, some_tokens
from support.run import run, run_streams, step
from weft.kernels.kv_rows import DenseRows, PagedRows
from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import KINDS, IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch

SIZES = PoolSizes(tokens=1024, slots=4, context=512, burst=512, page=16)


def pools_of(**changes: int) -> Pools:
    return Pools(small_model().config, dataclasses.replace(SIZES, **changes))


def used(pools: Pools) -> dict[str, int]:
    return {kind: allocator.total - allocator.free for kind, allocator in pools.allocators.items()}


def grow(state: SequenceState, count: int) -> None:
    """As a model's step does, without one."""
    state.reserve(count)
    state.commit(count)


@pytest.mark.parametrize("page", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 17, 127, 128, 300])
def test_pages_held_follow_from_the_length(page: int, length: int) -> None:
    pools = pools_of(page=page)
    state = SequenceState(pools)
    grow(state, length)
    first = max(0, length - pools.config.sliding_window)
    assert used(pools) == {
        "window": (length - 1) // page - first // page + 1,
        "c4": -(-(length // 4) // page),
        "c128": -(-(length // 128) // page),
    }
    state.close()
    assert free(pools)


def test_pages_do_not_depend_on_the_steps() -> None:
    pools = pools_of(page=7)
    whole, pieces = SequenceState(pools), SequenceState(pools)
    grow(whole, 200)
    for count in (1, 2, 50, 75, 1, 71):
        grow(pieces, count)
    assert {k: set(whole.pages[k]) for k in KINDS} == {k: set(pieces.pages[k]) for k in KINDS}


def test_window_pages_are_freed_as_the_window_moves() -> None:
    pools = pools_of(page=4)
    state = SequenceState(pools)
    for _ in range(100):
        grow(state, 1)
        assert used(pools)["window"] <= 16 // 4 + 1
    assert set(state.pages["window"]) == {21, 22, 23, 24}
    assert pools.tables["window"][state.slot].count_nonzero() == 4


def test_a_fork_takes_a_slot_and_no_page() -> None:
    pools = pools_of()
    parent = SequenceState(pools)
    grow(parent, 150)
    before = used(pools)
    child = parent.fork()
    assert used(pools) == before
    assert pools.free_slots == SIZES.slots - 2
    assert child.length == 150
    parent.close()
    assert used(pools) == before
    child.close()
    assert free(pools)


def test_only_pages_about_to_be_written_are_copied() -> None:
    pools = pools_of(page=4)
    parent = SequenceState(pools)
    grow(parent, 34)  # rows 32 and 33 of window page 8 are written, c4 page 1 is full
    child = parent.fork()
    before = used(pools)
    child.reserve(2)  # token 35 completes entry 8, the first of c4 page 2
    assert used(pools) == before | {"window": before["window"] + 1, "c4": before["c4"] + 1}
    assert child.pages["window"][8] != parent.pages["window"][8]
    shared = {n for n, page in child.pages["window"].items() if parent.pages["window"].get(n) == page}
    assert shared == set(parent.pages["window"]) - {8}
    assert child.pages["c4"][1] == parent.pages["c4"][1]


def test_the_last_holder_writes_in_place() -> None:
    pools = pools_of()
    parent = SequenceState(pools)
    grow(parent, 34)
    child = parent.fork()
    page = parent.pages["window"][2]
    parent.close()
    before = used(pools)
    child.reserve(1)
    assert child.pages["window"][2] == page
    assert used(pools) == before


def test_can_reserve_says_what_reserve_can_do() -> None:
    pools = pools_of(tokens=64, slots=1, burst=32)
    state = SequenceState(pools)
    most = max(count for count in range(500) if state.can_reserve(count))
    assert all(state.can_reserve(count) for count in range(most))
    with pytest.raises(AssertionError, match="can_reserve"):
        state.reserve(most + 1)
    assert used(pools) == dict.fromkeys(KINDS, 0)
    state.reserve(most)
    pools.check()


def test_can_reserve_counts_the_copies_a_fork_needs() -> None:
    pools = pools_of(slots=2, page=4)
    parent = SequenceState(pools)
    grow(parent, 34)
    child = parent.fork()
    window = pools.allocators["window"]
    taken = [window.alloc() for _ in range(window.free)]
    assert not child.can_reserve(1)
    window.release(taken.pop())
    assert child.can_reserve(1)


@pytest.mark.parametrize("page", [1, 7, 64])
def test_forks_of_one_parent_do_not_see_each_other(page: int) -> None:
    model, prefix = small_model(), some_tokens(133)
    pools = Pools(model.config, dataclasses.replace(SIZES, page=page))
    parent = SequenceState(pools)
    step(model, [(parent, prefix)])
    children = [parent.fork() for _ in range(3)]
    tails = [some_tokens(70, seed) for seed in range(3)]
    for i in range(0, 70, 10):  # in turn, so that pages are copied between each other's writes
        streams = [step(model, [(c, t[i : i + 10])])[0] for c, t in zip(children, tails, strict=True)]
    for tail, last in zip(tails, streams, strict=True):
        assert torch.equal(model.logits(last), run(model, prefix + tail)[-10:])
    more = some_tokens(20, seed=9)
    assert torch.equal(model.logits(step(model, [(parent, more)])[0]), run(model, prefix + more)[-20:])


@pytest.mark.parametrize("page", [1, 7, 16])
def test_mtp_rows_survive_forks(page: int) -> None:
    """The MTP row of a token is written one step late, when the token after it is known."""
    model, tokens = small_model(), some_tokens(60)
    pools = Pools(model.config, dataclasses.replace(SIZES, page=page))
    state, logits = SequenceState(pools), []
    for start, end in ((0, 20), (20, 21), (21, 40), (40, 60)):
        siblings = [state, state.fork()]
        for which, own in enumerate(siblings):  # the second writes other rows at the same positions
            part = tokens[start:end] if which == 0 else some_tokens(end - start, seed=end)
            mtp = mtp_step(own, part)
            logits += [mtp] if which == 0 else []
        siblings[1].close()
    streams = run_streams(model, tokens)
    fresh = SequenceState(Pools(model.config, SIZES))
    fresh.reserve(len(tokens))
    batch = Batch(fresh.pools, [Span(fresh.slot, 0, len(tokens) - 1)])
    whole = model.mtp_logits(model.forward_mtp(streams[:-1], torch.tensor(tokens[1:]), batch))
    assert torch.equal(torch.cat(logits), whole)


def mtp_step(state: SequenceState, part: list[int]) -> Tensor:
    """Run `part` through backbone and MTP block; the MTP logits of the rows whose next token it has."""
    model, pools, start = small_model(), state.pools, state.length
    before = pools.streams[state.slot].clone()
    state.reserve(len(part))
    streams = model.forward(torch.tensor(part), Batch(pools, [state.span(len(part))]))
    first = max(0, start - 1)
    rows = streams[:-1] if start == 0 else torch.cat((before[None], streams[:-1]))
    following = torch.tensor(part[1:] if start == 0 else part)
    out = model.forward_mtp(rows, following, Batch(pools, [Span(state.slot, first, len(rows))]))
    state.commit(len(part))
    return model.mtp_logits(out)


@pytest.mark.parametrize("ratios", [(0, 4, 128), (4, 4, 0), (128,), (0,)])
@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kv", "index"),
    [(torch.float32, "model", "model"), (torch.bfloat16, "model", "fp8"), (torch.float32, "fp8", "fp4")],
)
def test_nbytes_counts_every_tensor(
    ratios: tuple[int, ...], mtp: bool, dtype: torch.dtype, kv: KvFormat, index: IndexFormat
) -> None:
    pools = Pools(small_config(*ratios, mtp=mtp), SIZES, dtype, kv_format=kv, index_format=index)
    assert pools.nbytes == sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(pools)}.values())


def tensors_in(value: object) -> list[Tensor]:
    """All tensors reachable from it that own their memory."""
    if isinstance(value, Tensor):
        return [value] if value._base is None else []
    if isinstance(value, Pools | DenseRows | PagedRows):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_pools_hold_what_their_sizes_promise() -> None:
    """`tokens` over all slots, each with a window, and `burst` more in flight, whatever the page."""
    for page in (1, 2, 7, 16, 64):
        pools = pools_of(tokens=1100, slots=4, burst=100, page=page)
        states = [SequenceState(pools) for _ in range(4)]
        for state in states:
            for count in (100, 100, 25, 25):
                grow(state, count)
        assert all(state.can_reserve(25) for state in states)
        for state in states:  # 100 tokens in flight at once
            state.reserve(25)
        pools.check()
