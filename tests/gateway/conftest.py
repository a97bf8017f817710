"""One gateway over the embedded model, for all clients of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.gateway import Gateway, serving, small_engine
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine

POOLS = PoolSizes(tokens=32768, slots=48, context=16384, burst=1024, checkpoints=128)


def embedded() -> Engine:
    return Engine.embedded(EngineConfig(pools=POOLS))


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    programs = ["weft.programs.fork_and_judge", "weft.programs.extraction", "support.served"]
    with serving(embedded, programs=programs) as made:
        yield made


@pytest.fixture
def small() -> Iterator[Gateway]:
    """Four slots, random weights, a server of its own."""
    with serving(small_engine) as made:
        yield made
