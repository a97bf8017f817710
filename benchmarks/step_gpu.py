"""A decode step of DeepSeek-V4-Flash on a GPU: microseconds and kernels of a layer of each kind, and what is left.

    python benchmarks/step_gpu.py [--experts fp8|fp4] [--context 8192] [--batches 1 32 256]

A card holds a few layers, so models of one kind of layer are built on random weights of V4-Flash's sizes, in its
formats. Their decode steps are captured as the engine captures them, over sequences of that context, and the
graphs replayed. A layer is half of what four of them have more than two; the rest is what is left of two, the
head, and drawing a token at temperature 1. Each time is the median of replays, in rounds; all rounds' medians are
kept. A step's 43 layers are added up from that. Without a GPU it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from support.gpu import device, microseconds
from support.graph_nodes import Node, nodes, summary
from support.random_weights import RandomWeights
from support.record import record
from weft.kernels.gpu.base import Paged
from weft.kernels.gpu.sampling import sample_rows
from weft.kernels.reference.sampling import example
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import C4, C128, ModelConfig
from weft.runtime.model.batch import Batch
from weft.runtime.model.cuda.linear import project
from weft.runtime.model.cuda.model import DeviceModel

BATCHES = (1, 32, 256)
RATIOS = {"window": 0, "c4a": C4, "c128a": C128}
DEPTHS = (2, 4)
ROUNDS, REPLAYS = 3, 30
PAGE = 64


class Keeping:
    """Captures as `CudaCapture` does, and keeps the graphs."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = run()
        graph.instantiate()
        self.graphs.append(graph)
        return graph.replay, out


def config_of(ratio: int, whole: ModelConfig) -> ModelConfig:
    """The largest depth of one kind of layer, no MTP block. All layers take experts by token id: a random gate
    would send most tokens to the same ones, which a trained one does not."""
    depth = DEPTHS[-1]
    return replace(
        whole,
        num_hidden_layers=depth,
        compress_ratios=(ratio,) * depth,
        num_hash_layers=depth,
        num_nextn_predict_layers=0,
    )


def begun(model: DeviceModel, count: int, context: int) -> tuple[DevicePools, list[SequenceState]]:
    """Sequences that stand before their last token of the context or up to three before it, on random rows."""
    sizes = PoolSizes(
        tokens=count * (context + PAGE * C128),
        slots=count,
        context=context,
        burst=context,
        page=PAGE,
        checkpoints=1,
    )
    pools = model.make_pools(sizes, "fp8", "fp8")
    for pool in (*pools.pages, *pools.key_pages):
        scramble(pool)
    states = []
    for number in range(count):
        state = SequenceState(pools)
        state.reserve(context - 1 - number % C4)
        state.commit(context - 1 - number % C4)
        state.reserve(1)
        states.append(state)
    return pools, states


def scramble(pool: Paged) -> None:
    """Random rows, none of them infinite or large, behind the null page."""
    layout, rows = pool.layout, pool.bytes[1:]
    rows.random_(0, 256)
    rows.bitwise_and_(0xB7)  # of e4m3, e2m1 and bfloat16: small exponents only
    rows[:, layout.scales_at :] = 0x3C if layout.scales == "float32" else 125


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds, a median."""
    times = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def step_of(model: DeviceModel, states: list[SequenceState], pools: DevicePools) -> Tensor:
    ids = torch.randint(0, model.config.vocab_size, (len(states),))
    return model.forward(ids, Batch(pools, [state.span(1) for state in states]))


Measured = dict[int, dict[int, tuple[list[float], list[Node]]]]


def measure(model: DeviceModel, context: int, batches: Sequence[int]) -> Measured:
    """Depth -> batch -> medians, and what was captured."""
    blocks, found = model.blocks, {}
    for depth in DEPTHS:
        model.blocks = blocks[:depth]
        pools, states = begun(model, max(batches), context)
        found[depth] = {}
        for batch in batches:
            kept = model._capture = Keeping()
            model._steps.clear()  # graphs that would be replayed
            h = step_of(model, states[:batch], pools)
            assert bool(torch.isfinite(h).all()), "weights are to keep streams finite"
            times = [replayed(kept.graphs[-1]) for _ in range(ROUNDS)]
            found[depth][batch] = times, nodes(kept.graphs[-1])
        model._steps.clear()
    model.blocks = blocks
    return found


def head_and_draw(model: DeviceModel, batch: int) -> float:
    h = torch.randn(batch, model.config.hc_mult, model.config.hidden_size, device="cuda").bfloat16()
    with torch.inference_mode():
        head = microseconds([lambda: project(model.readout(h), model.head, dtype=torch.float32)])
        return head + microseconds([partial(sample_rows, **example(batch, "cuda"))])


def of_layer(found: Measured, batch: int) -> tuple[float, dict[str, int]]:
    few, many = (found[depth][batch] for depth in DEPTHS)
    more = DEPTHS[1] - DEPTHS[0]
    names = Counter(summary(many[1]))
    names.subtract(summary(few[1]))
    time = (statistics.median(many[0]) - statistics.median(few[0])) / more
    return time, {name: count // more for name, count in names.items() if count}


def figures(experts: str, context: int, batches: Sequence[int]) -> dict[str, Any]:
    whole = ModelConfig()
    layers: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, Any]] = {}
    rest: dict[str, float] = {}
    rounds: dict[str, Any] = {}
    for kind, ratio in RATIOS.items():
        config = config_of(ratio, whole)
        model = DeviceModel(config, RandomWeights(config, "cuda"), experts=experts)  # type: ignore[arg-type]
        found = measure(model, context, batches)
        rounds[kind] = {
            d: {b: [round(t, 1) for t in times] for b, (times, _) in r.items()} for d, r in found.items()
        }
        layers[kind], kernels[kind] = {}, {}
        for batch in batches:
            time, names = of_layer(found, batch)
            layers[kind][str(batch)] = round(time, 2)
            kernels[kind][str(batch)] = {"nodes": sum(names.values()), "names": names}
            if kind == "window":
                least = statistics.median(found[DEPTHS[0]][batch][0]) - DEPTHS[0] * time
                rest[str(batch)] = round(least + head_and_draw(model, batch), 1)
        print(kind, layers[kind], {b: k["nodes"] for b, k in kernels[kind].items()}, flush=True)
        del model, found
        gc.collect()
        torch.cuda.empty_cache()
    steps = {
        batch: round(rest[batch] + sum(layers[kind][batch] for kind in whole.layer_kinds), 1) for batch in rest
    }
    return {
        "device": device()["gpu"],
        "experts": experts,
        "context": context,
        "per layer us": layers,
        "rest us": rest,
        f"step us of {whole.num_hidden_layers} layers": steps,
        "tokens/s": {batch: round(1e6 * int(batch) / time) for batch, time in steps.items()},
        "graph nodes of a layer": kernels,
        "us of graphs, by layers and batch, each round": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", choices=("fp8", "fp4"), default="fp8")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("not run: there is no GPU here")
    torch.manual_seed(0)
    record("step_gpu", figures(options.experts, options.context, options.batches))


if __name__ == "__main__":
    main()
