"""Drive a model over token lists without the engine: chunked, batched, with all logits kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.runtime.cache.capacity import IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.base import Network
from weft.runtime.model.batch import Batch


def pools_for(
    model: Network,
    sequences: Sequence[Sequence[int]],
    page: int = 16,
    kv: KvFormat = "model",
    index: IndexFormat = "model",
) -> Pools:
    total = sum(len(s) for s in sequences)
    longest = max(len(s) for s in sequences)
    sizes = PoolSizes(
        tokens=total + 128 * len(sequences),
        slots=len(sequences) + 2,
        context=longest + 256,
        burst=total,
        page=page,
    )
    return model.make_pools(sizes, kv, index)


def step(model: Network, work: Sequence[tuple[SequenceState, Sequence[int]]]) -> list[Tensor]:
    """One forward over (sequence, its next tokens); returns each sequence's streams [n, hc, D]."""
    for state, ids in work:
        state.reserve(len(ids))
    spans = [state.span(len(ids)) for state, ids in work]
    batch = Batch(work[0][0].pools, spans)
    flat = torch.tensor([token for _, ids in work for token in ids])
    streams = model.forward(flat, batch)
    for state, ids in work:
        state.commit(len(ids))
    return list(streams.split([len(ids) for _, ids in work]))


def run_streams(
    model: Network, ids: Sequence[int], chunks: Sequence[int] | int = 1 << 20, page: int = 16
) -> Tensor:
    """Streams [S, hc, D] of one sequence, fed in chunks (one size, or sizes used in turn)."""
    state = SequenceState(pools_for(model, [ids], page))
    sizes = [chunks] if isinstance(chunks, int) else list(chunks)
    out, start, turn = [], 0, 0
    while start < len(ids):
        part = ids[start : start + sizes[turn % len(sizes)]]
        out += step(model, [(state, part)])
        start, turn = start + len(part), turn + 1
    state.close()
    state.pools.check()
    return torch.cat(out)


def run(model: Network, ids: Sequence[int], chunks: Sequence[int] | int = 1 << 20, page: int = 16) -> Tensor:
    """Logits [S, V] of one sequence."""
    return model.logits(run_streams(model, ids, chunks, page))


def run_together(
    model: Network, sequences: Sequence[Sequence[int]], chunks: Sequence[int], page: int = 16
) -> list[Tensor]:
    """Logits of sequences run in one batch, sequence i in chunks of chunks[i], until all are done."""
    pools = pools_for(model, sequences, page)
    states = [SequenceState(pools) for _ in sequences]
    out: list[list[Tensor]] = [[] for _ in sequences]
    while True:
        work = [
            (i, sequences[i][s.length : s.length + chunks[i]])
            for i, s in enumerate(states)
            if s.length < len(sequences[i])
        ]
        if not work:
            break
        for (i, _), streams in zip(work, step(model, [(states[i], ids) for i, ids in work]), strict=True):
            out[i].append(streams)
    for state in states:
        state.close()
    pools.check()
    return [model.logits(torch.cat(parts)) for parts in out]


def greedy(model: Network, prompt: Sequence[int], steps: int) -> list[int]:
    """`steps` tokens by argmax, one decode step each."""
    state = SequenceState(pools_for(model, [[*prompt, *[0] * steps]]))
    out: list[int] = []
    part = list(prompt)
    for _ in range(steps):
        streams = step(model, [(state, part)])[0]
        out.append(int(model.logits(streams[-1:]).argmax()))
        part = [out[-1]]
    return out
