"""Peak memory and speed of a long prefill of the `tiny` preset: no part of it may grow with the square of n.

Each length runs in a process of its own, because peak memory is a property of a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from support.record import peak_rss_gib, record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.config import preset
from weft.runtime.model.batch import Batch
from weft.runtime.model.model import Model

CASES = [(4096, 512), (8192, 512), (16384, 512), (32768, 512), (32768, 32768)]


def prefill(length: int, chunk: int) -> dict[str, float]:
    torch.set_num_threads(1)
    config = preset("tiny")
    model = Model(config, dummy_weights(config, 0))
    before = peak_rss_gib()
    pools = Pools(config, PoolSizes(tokens=length + chunk, slots=1, context=length + chunk, burst=chunk))
    state = SequenceState(pools)
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for start in range(0, length, chunk):
        part = ids[start : start + chunk]
        state.reserve(len(part))
        model.forward(part, Batch(pools, [state.span(len(part))]))
        state.commit(len(part))
    seconds = time.perf_counter() - started
    return {
        "length": length,
        "chunk": chunk,
        "tokens_per_second": round(length / seconds, 1),
        "peak_rss_gib": round(peak_rss_gib(), 3),
        "rss_before_gib": round(before, 3),
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(prefill(int(sys.argv[1]), int(sys.argv[2]))))
        return
    rows = []
    for length, chunk in CASES:
        command = [sys.executable, __file__, str(length), str(chunk)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    record("long_prefill", {"rows": rows})


if __name__ == "__main__":
    main()
