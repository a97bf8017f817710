"""Steps that are captured once and replayed: a launch costs the host 10 microseconds, a step has a thousand of
them.

A step is a function of buffers that stay where they are. Its first run is a real one, which compiles what it
needs; right behind it the same function is captured, which runs nothing. From then on its inputs are written
into the same buffers and the graph is replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741


class Capture(Protocol):
    def __call__(self, run: Callable[[], O]) -> tuple[Callable[[], None], O]:
        """What replays `run`, and the results that each replay writes anew."""


@dataclass(frozen=True)
class _Held:
    """inputs: written before each run. replay, outputs: of the captured graph, if there is one."""

    inputs: Any
    replay: Callable[[], None] | None
    outputs: Any


class Graphs:
    """At most `most` steps, by what they were made for; the one that was not used for longest goes first.

    Results of a replayed step are valid until it is replayed again: who keeps them longer copies them. Those of
    other steps stay as they are. Without `capture` the functions run as they are, on the same buffers.
    """

    def __init__(self, capture: Capture | None, most: int) -> None:
        self._capture = capture
        self._most = most
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def run(
        self, key: Hashable, inputs: Callable[[], I], fill: Callable[[I], object], function: Callable[[I], O]
    ) -> O:
        """`function` of the buffers that `inputs` made for this key, after `fill` has written them."""
        held = self._held.get(key)
        if held is None:
            return self._first(key, inputs(), fill, function)
        self._held.move_to_end(key)
        fill(held.inputs)
        if held.replay is None:
            out: O = function(held.inputs)
            return out
        held.replay()
        out = held.outputs
        return out

    def _first(self, key: Hashable, buffers: I, fill: Callable[[I], object], function: Callable[[I], O]) -> O:
        fill(buffers)
        out = function(buffers)
        replay, outputs = None, None
        if self._capture is not None:
            replay, outputs = self._capture(lambda: function(buffers))
        while len(self._held) >= self._most:
            self._held.popitem(last=False)
        self._held[key] = _Held(buffers, replay, outputs)
        return out


class CudaCapture:
    """Captures on one device. Graphs share a pool of memory, so they are replayed one after the other only."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        # The pool lives as long as a graph that was captured with it, and is of no use behind the last one.
        self._first = self(lambda: torch.zeros(1, device=device))

    def __call__(self, run: Callable[[], O]) -> tuple[Callable[[], None], O]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device in the meantime is none of the graph's business.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out
