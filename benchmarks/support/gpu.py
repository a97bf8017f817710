"""Timing on a GPU: graphs replayed over inputs that are not in L2, medians; and the card's own ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 15
# Bytes of fresh inputs between two uses of the same ones, as a multiple of L2.
BEYOND_L2 = 3


def microseconds(calls: Sequence[Callable[[], object]], rounds: int = 1) -> float:
    """Median time of one call, over replays of a graph of all of them, `rounds` times over.

    calls: the same work on inputs of their own, together larger than L2.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and fills the allocator
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]
    times = []
    for _ in range(REPEATS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(kept))
    return statistics.median(times[2:])


def sets(bytes_each: int, least: int = 4, most: int = 64) -> int:
    """How many sets of inputs of that size to take in turn."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(least, min(most, -(-BEYOND_L2 * l2 // max(1, bytes_each))))


def ceilings() -> dict[str, float]:
    """What this card does: copies (bytes read and written), and dense products of random values."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    # A kernel's copy and the copy engine's; in a graph the latter is the slower one.
    whole = source.view(torch.int32)
    copy = min(
        microseconds([lambda: target.copy_(source)]),
        microseconds([lambda: torch.bitwise_not(whole, out=target.view(torch.int32))]),
    )
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds([lambda: a @ b])
    flop = 2 * size**3
    out = {"copy TB/s": 2 * source.numel() / copy / 1e6, "bf16 TFLOP/s": flop / product / 1e6}
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    fp8 = microseconds([lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)])
    return {name: round(value, 2) for name, value in {**out, "fp8 TFLOP/s": flop / fp8 / 1e6}.items()}


def device() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2 MiB": properties.L2_cache_size / 2**20,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
