"""The bytes printed at start are the bytes allocated, and the capacity printed is what really fits."""

import itertools

import pytest
import torch

from support import draw
from weft.runtime.cache.capacity import KINDS, Capacity, IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import ModelConfig, preset

FORMATS = list(itertools.product(("model", "fp8"), ("model", "fp8", "fp4")))


@pytest.mark.parametrize(("kv", "index"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_equals_allocation(kv: KvFormat, index: IndexFormat, dtype: torch.dtype) -> None:
    for seed, page in ((0, 1), (1, 7), (2, 32), (3, 64)):
        config = preset("tiny") if seed == 0 else draw.random_config(seed)
        sizes = PoolSizes(tokens=5000, slots=7, context=3000, burst=300, page=page)
        pools = Pools(config, sizes, dtype, kv_format=kv, index_format=index)
        assert Capacity(config, sizes, dtype.itemsize, kv, index).total == pools.nbytes


def fits(config: ModelConfig, sizes: PoolSizes, length: int) -> int:
    """Sequences of `length` tokens that can be filled in chunks before something runs out."""
    pools = Pools(config, sizes)
    for count in itertools.count():
        if not pools.free_slots:
            return count
        state = SequenceState(pools)
        for start in range(0, length, sizes.burst):
            part = min(sizes.burst, length - start)
            if not state.can_reserve(part):
                return count
            state.reserve(part)
            state.commit(part)
    raise AssertionError


@pytest.mark.parametrize("length", [1, 100, 128, 1000, 2999])
@pytest.mark.parametrize("page", [1, 7, 32])
def test_the_printed_number_of_sequences_fits_and_one_more_does_not(length: int, page: int) -> None:
    config = preset("tiny")
    sizes = PoolSizes(tokens=6000, slots=20, context=3000, burst=256, page=page)
    assert fits(config, sizes, length) == Capacity(config, sizes).sequences(length)


def test_a_sequence_longer_than_the_context_does_not_fit() -> None:
    assert Capacity(preset("tiny"), PoolSizes(context=1000)).sequences(1001) == 0


def test_report_names_every_part() -> None:
    capacity = Capacity(preset("flash"), PoolSizes(context=65536), 2, "fp8", "fp4")
    labels = [label for label, _ in capacity.report()]
    assert labels[: len(capacity.parts)] == list(capacity.parts)
    assert "sequences of 65,536 tokens" in labels
    assert len(KINDS) == 3
