"""Forks share what their parent computed, which is computed once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator

import pytest

from support.engine import Gate, byte_tokenizer, core_of, finish, running, small_model, some_tokens
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits
from weft.runtime.engine.core import Core
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import RequestError

PROMPT = some_tokens(100, seed=2)
PARAMS = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)


def counts(usage: m.Usage) -> tuple[int, int, int, int]:
    return usage.history, usage.cached, usage.computed, usage.generated


def close(family: list[Sequence]) -> None:
    for one in family:
        one.close()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_prefix_is_computed_once(count: int) -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        parent = engine.open(PROMPT)
        children = await parent.fork(count)
        assert gate.steps == [64, 36]
        assert [counts(child.origin) for child in children] == [(100, 0, 100, 0)] * count
        again = await parent.fork(count)
        assert [counts(child.origin) for child in again] == [(100, 100, 0, 0)] * count
        assert gate.steps == [64, 36]
        outputs = await asyncio.gather(*(child.complete(PARAMS) for child in (*children, *again)))
        # The first token comes from the streams that the fork copied: nothing is computed for it.
        assert [counts(output.usage) for output in outputs] == [(100, 100, 2, 3)] * 2 * count
        assert sum(gate.steps) == 100 + 2 * 2 * count
        close([parent, *children, *again])

    with running(gate) as engine:
        finish(work(engine))


def test_only_what_is_new_is_computed() -> None:
    gate = Gate()

    async def work(engine: Engine) -> None:
        parent = engine.open(PROMPT)
        (child,) = await parent.fork()
        child.extend([5, 6, 7, 8])
        assert counts((await child.complete(PARAMS)).usage) == (104, 100, 6, 3)
        (grandchild,) = await child.fork()
        # The child's last token was drawn and not computed; the fork computes it, for both.
        assert counts(grandchild.origin) == (107, 106, 1, 0)
        assert counts((await grandchild.complete(PARAMS)).usage) == (107, 107, 2, 3)
        assert counts((await child.complete(PARAMS)).usage) == (107, 107, 2, 3)
        close([parent, child, grandchild])

    with running(gate) as engine:
        finish(work(engine))
    assert sum(gate.steps) == 100 + 6 + 1 + 2 + 2


def test_children_go_on_without_their_parent() -> None:
    async def work(engine: Engine) -> list[int]:
        with engine.open(PROMPT) as parent:
            (child,) = await parent.fork()
        with child:
            (grandchild,) = await child.fork()
        with grandchild:
            return (await grandchild.complete(PARAMS)).tokens

    with running() as engine:
        assert finish(work(engine)) == finish(engine.generate(PROMPT, PARAMS)).tokens


def test_a_fork_holds_one_copy_of_the_prefix() -> None:
    async def work(engine: Engine) -> None:
        parent = engine.open(PROMPT)
        await parent.complete(SamplingParams(max_tokens=0))
        pools = core_of(engine).pools
        before = {kind: allocator.free for kind, allocator in pools.allocators.items()}
        children = await parent.fork(10)
        assert {kind: allocator.free for kind, allocator in pools.allocators.items()} == before
        assert pools.free_slots == pools.sizes.slots - 11
        close([parent, *children])

    with running() as engine:
        finish(work(engine))


def test_tokens_appended_behind_a_fork_are_the_parents_alone() -> None:
    async def work(engine: Engine) -> None:
        parent = engine.open(PROMPT)
        forking = asyncio.ensure_future(parent.fork())
        await asyncio.sleep(0)  # the call is on its way
        parent.extend([5, 6, 7])
        (child,) = await forking
        assert (await child.complete(PARAMS)).usage.history == 100
        assert (await parent.complete(PARAMS)).usage.history == 103
        close([parent, child])

    with running() as engine:
        finish(work(engine))


def test_an_empty_history_can_be_forked() -> None:
    async def work(engine: Engine) -> list[int]:
        with engine.open([]) as parent:
            (child,) = await parent.fork()
            assert counts(child.origin) == (0, 0, 0, 0)
        with child:
            child.extend(PROMPT)
            return (await child.complete(PARAMS)).tokens

    with running() as engine:
        assert finish(work(engine)) == finish(engine.generate(PROMPT, PARAMS)).tokens


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count: int) -> None:
    async def work(engine: Engine) -> None:
        with engine.open(PROMPT) as parent, pytest.raises(RequestError) as caught:
            await parent.fork(count)
        assert (caught.value.field, caught.value.value) == ("count", count)

    with running() as engine:
        finish(work(engine))


def test_an_older_fork_is_served_before_younger_ones_that_would_fit() -> None:
    """Three clients fork, draw and close in a loop, from a sequence opened first."""
    waiting: dict[int, m.Event] = {}
    core = core_with(slots=8, emit=lambda event: waiting.update({event.call: event}))
    ids = itertools.count(1)
    base, big = next(ids), next(ids)
    core.handle(m.Open(base, some_tokens(9)))
    core.handle(m.Open(big, some_tokens(9, 1)))
    clients = [Client(core, base, length, ids, waiting) for length in (9, 11, 13)]
    for _ in range(3):
        turn(core, clients)
    fork = next(ids)
    core.handle(m.Fork(fork, big, [next(ids) for _ in range(5)]))
    for _ in range(60):
        turn(core, clients)
        if fork in waiting:
            break
    assert isinstance(waiting[fork], m.Done)


class Client:
    """Forks one child, lets it draw `length` tokens, closes it, and begins again."""

    def __init__(self, core: Core, base: int, length: int, ids: Iterator[int], ended: dict[int, m.Event]) -> None:
        self.core, self.base, self.ids, self.ended = core, base, ids, ended
        self.params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, seed=1)
        self.fork()

    def fork(self) -> None:
        self.child, self.call, self.draws = next(self.ids), next(self.ids), False
        self.core.handle(m.Fork(self.call, self.base, [self.child]))

    def poll(self) -> None:
        if not isinstance(self.ended.get(self.call), m.Done):
            return
        if self.draws:
            self.core.handle(m.Close(self.child))
            self.fork()
        else:
            self.call, self.draws = next(self.ids), True
            self.core.handle(m.Generate(self.call, self.child, self.params))


def turn(core: Core, clients: list[Client]) -> None:
    core.step()
    for client in clients:
        client.poll()


def core_with(slots: int, emit: Callable[[m.Event], None]) -> Core:
    model = small_model()
    pools = Pools(model.config, PoolSizes(tokens=2048, slots=slots, context=512, burst=64, page=16))
    return Core(model, pools, byte_tokenizer(), CoreLimits(chunk=64, drafts=0), emit)
