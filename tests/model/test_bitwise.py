"""Bitwise: chunking, batching, page size and placement change no bit of the logits."""

import random

import pytest
import torch

from support import hf
from support.engine import UNPAGED, small_model, some_tokens
from support.run import pools_for, run, run_together, step
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import preset
from weft.runtime.model.model import Model

CASES = [("tiny", torch.float32, False), ("tiny", torch.float32, True), ("tiny", torch.bfloat16, False)]
LENGTHS = (1, 4, 127, 129, 255, 300, 513, 700)


def model_of(seed: int, dtype: torch.dtype = torch.float32, quant_sim: bool = False) -> Model:
    config = preset("tiny") if seed == 0 else hf.random_config(seed)
    return Model(config, hf.random_weights(config, seed), dtype=dtype, quant_sim=quant_sim)


def tokens(model: Model, length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(model.config.vocab_size), k=length)


@pytest.mark.parametrize(("dtype", "quant_sim"), [(d, q) for _, d, q in CASES])
@pytest.mark.parametrize("chunk", [1, 3, 64, 100, (5, 1, 127, 2), (128, 4)])
def test_chunks_give_the_bits_of_one_shot(
    dtype: torch.dtype, quant_sim: bool, chunk: int | tuple[int, ...]
) -> None:
    model = model_of(0, dtype, quant_sim)
    ids = tokens(model, 400)
    assert torch.equal(run(model, ids, chunk), run(model, ids))


@pytest.mark.parametrize("seed", range(1, 13))
def test_random_configs_in_random_chunks(seed: int) -> None:
    model = model_of(seed)
    draw = random.Random(seed)
    ids = tokens(model, draw.randint(257, 600), seed)
    chunks = [draw.choice((1, 2, 3, 7, 64, 100, 129)) for _ in range(40)]
    assert torch.equal(run(model, ids, chunks), run(model, ids))


@pytest.mark.parametrize(("dtype", "quant_sim"), [(d, q) for _, d, q in CASES])
def test_eight_sequences_together_equal_each_alone(dtype: torch.dtype, quant_sim: bool) -> None:
    model = model_of(0, dtype, quant_sim)
    sequences = [tokens(model, length, seed) for seed, length in enumerate(LENGTHS)]
    together = run_together(model, sequences, chunks=[1, 3, 64, 100, 17, 128, 300, 41])
    for ids, logits in zip(sequences, together, strict=True):
        assert torch.equal(logits, run(model, ids))


@pytest.mark.parametrize("page", [1, 2, 5, 64])
def test_page_size_changes_nothing(page: int) -> None:
    model = model_of(0)
    ids = tokens(model, 300)
    assert torch.equal(run(model, ids, 33, page=page), run(model, ids, page=16))


def test_no_page_size_from_1_to_64_changes_anything() -> None:
    """Beside a run whose pages hold everything, on a model small enough to try them all."""
    model = small_model(0, 4, 128)
    ids = some_tokens(300)
    unpaged = run(model, ids, page=UNPAGED)
    for page in range(1, 65):
        assert torch.equal(run(model, ids, (100, 1, 129, 7, 300), page=page), unpaged), page


def test_two_threads_give_the_same_invariance() -> None:
    """Bits may differ between thread counts; within one they may not depend on chunks."""
    torch.set_num_threads(2)
    try:
        model = model_of(0)
        ids = tokens(model, 400)
        whole = run(model, ids)
        assert torch.equal(run(model, ids, 100), whole)
        assert torch.equal(run(model, ids, (1, 64, 3)), whole)
    finally:
        torch.set_num_threads(1)


def test_forks_share_and_do_not_disturb_each_other() -> None:
    """A parent and two children go on in one batch; each equals its own tokens run cold."""
    model = model_of(0)
    prefix = tokens(model, 203)
    pools = pools_for(model, [prefix] * 12)
    parent = SequenceState(pools)
    start = step(model, [(parent, prefix)])[0]
    free = {kind: allocator.free for kind, allocator in pools.allocators.items()}
    branches = [parent, parent.fork(), parent.fork()]
    assert {kind: allocator.free for kind, allocator in pools.allocators.items()} == free, "forking copies nothing"
    tails = [tokens(model, 150, seed) for seed in (1, 2, 3)]
    streams = [[start], [start], [start]]
    for at in range(0, 150, 30):
        work = [(state, tail[at : at + 30]) for state, tail in zip(branches, tails, strict=True)]
        for own, rows in zip(streams, step(model, work), strict=True):
            own.append(rows)
    for own, tail in zip(streams, tails, strict=True):
        assert torch.equal(model.logits(torch.cat(own)), run(model, prefix + tail))
    for state in branches:
        state.close()
    pools.check()
    assert all(allocator.free == allocator.total for allocator in pools.allocators.values())
