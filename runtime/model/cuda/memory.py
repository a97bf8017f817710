"""What a model takes of a card: weights, pools, and what a step needs beside them, known before any of it is
there.

Weights and pools are counted to the byte; workspaces are bounds of the largest tensors of a step that live at the
same time. Torch is not imported.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from weft.runtime.cache.capacity import Capacity, PoolSizes
from weft.runtime.checkpoint.layout import FP4_GROUP, FP8_BLOCK, Weight, ceil_div, weights
from weft.runtime.config import C4, C128, ModelConfig
from weft.runtime.errors import ConfigError

ExpertFormat = Literal["fp8", "fp4"]

_FLOAT32 = 4
# Scores of the indexer are made so many bytes at a time, and partial sums of attention about as many.
_SCORES = 256 << 20
_PARTIAL = 256 << 20
# A captured layer's nodes, in the driver's memory, and how many graphs are held; code and stacks of kernels.
_GRAPHED_LAYER = 96 << 10
_GRAPHS = 224
_DRIVER = 512 << 20
# Rows of the largest step that is captured, and of logits at a time.
_ROWS = 512


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one card. capacity: of the pools. chunk: prefill tokens of a step. experts: how FP4 experts are
    held. graphs: whether steps are captured."""

    capacity: Capacity
    chunk: int
    experts: ExpertFormat = "fp8"
    graphs: bool = True

    @property
    def config(self) -> ModelConfig:
        return self.capacity.config

    @property
    def weights(self) -> dict[str, int]:
        """By what they do."""
        return _weights(self.config, self.capacity.itemsize, self.experts)

    @property
    def pools(self) -> dict[str, int]:
        """On the card: page tables are the host's."""
        return {label: size for label, size in self.capacity.parts.items() if label != "page tables"}

    @property
    def workspaces(self) -> dict[str, int]:
        config, item = self.config, self.capacity.itemsize
        rows = max(_ROWS, self.chunk + self.capacity.sizes.slots)
        places = config.num_experts_per_tok + 1
        heads = config.num_attention_heads * config.head_dim
        streams = 3 * config.hc_mult * config.hidden_size
        attention = 3 * heads + config.q_lora_rank + config.o_groups * config.o_lora_rank
        experts = places * (config.hidden_size + config.moe_intermediate_size)
        found = {
            "a step's activations": rows * item * (streams + attention + experts),
            "a step's lists": rows * _FLOAT32 * self._columns(),
            "logits": 2 * _ROWS * _FLOAT32 * config.vocab_size,
        }
        if config.count("c4a"):
            found["scores of index keys"] = min(_SCORES, rows * self.capacity.sizes.context) + self._gathered()
        if self._columns() > 2048:
            found["attention's partial sums"] = _PARTIAL
        if self.graphs:
            nodes = _GRAPHS * config.num_hidden_layers * _GRAPHED_LAYER
            found["captured steps"] = nodes + _ROWS * item * (streams + attention + experts)
        return found | {"the driver": _DRIVER}

    def _columns(self) -> int:
        """Of all lists of a token of the longest sequence."""
        return 3 * self.config.sliding_window + self.config.index_topk + self.capacity.sizes.context // C128

    def _gathered(self) -> int:
        """Index keys that a prefill of the longest sequence gathers, of one layer."""
        return self.capacity.sizes.context // C4 * (self.config.index_head_dim + _FLOAT32)

    @property
    def total(self) -> int:
        return sum(sum(part.values()) for part in (self.weights, self.pools, self.workspaces))

    def report(self, free: int) -> list[tuple[str, str]]:
        """Label and value rows. free: bytes of the card that nobody has."""
        rows: list[tuple[str, str]] = []
        for label, part in (("weights", self.weights), ("pools", self.pools), ("workspaces", self.workspaces)):
            rows += [(f"  {name}", _size(size)) for name, size in part.items()]
            rows.append((label, _size(sum(part.values()))))
        return [*rows, ("all", _size(self.total)), ("free on the card", _size(free))]

    def check(self, free: int) -> None:
        """Raises `ConfigError` if it does not fit: of the pool setting to lower, and to what, if that can help."""
        if self.total <= free:
            return
        short = f"{_size(self.total - free)} more than the {_size(free)} that are free on the card"
        for name in self._settings():
            fits = self._largest(name, free)
            if fits is not None:
                value = getattr(self.capacity.sizes, name)
                raise ConfigError(f"pools.{name}", value, f"{short}; {fits:,} would fit")
        taken = _size(self.total - sum(self.pools.values()))
        raise ConfigError("device", "cuda", f"{short}, whatever the pools: weights and workspaces are {taken}")

    def _settings(self) -> tuple[str, ...]:
        """Of the pools, what takes most first."""
        parts = self.capacity.parts
        entries = sum(size for label, size in parts.items() if label.startswith("c"))
        raw = parts["window rows"] + parts["compressor tails"] + parts["streams"]
        sizes = self.capacity.sizes
        states = ("checkpoints", "slots") if sizes.checkpoints >= sizes.slots else ("slots", "checkpoints")
        return ("tokens", *states) if entries >= raw else (*states, "tokens")

    def _largest(self, name: str, free: int) -> int | None:
        """The most of a pool setting that fits, the others as they are; None if not even the least does."""
        low, high = (0 if name == "checkpoints" else 1), getattr(self.capacity.sizes, name)
        if self._with(name, low).total > free:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._with(name, middle).total <= free else (low, middle)
        return int(low)

    def _with(self, name: str, value: int) -> MemoryPlan:
        change: dict[str, int] = {name: value}
        sizes: PoolSizes = dataclasses.replace(self.capacity.sizes, **change)
        return dataclasses.replace(self, capacity=dataclasses.replace(self.capacity, sizes=sizes))


@cache
def _weights(config: ModelConfig, itemsize: int, experts: ExpertFormat) -> dict[str, int]:
    found: Counter[str] = Counter()
    for weight in weights(config):
        found[_part(weight)] += weight_bytes(weight, itemsize, experts)
    return dict(found)


def weight_bytes(weight: Weight, itemsize: int, experts: ExpertFormat) -> int:
    """Bytes of a weight on the card; itemsize: of the model's dtype.

    FP8: codes, and a scale per row and 128 columns. FP4 experts: the same, or packed as they are released.
    Matrices that are released in bfloat16 stay so, unless the model's dtype is wider; others are float32 or int32.
    """
    count = prod(weight.shape)
    if weight.storage == "fp4" and experts == "fp4":
        rows, columns = weight.shape
        return rows * (ceil_div(columns, 2) + ceil_div(columns, FP4_GROUP))
    if weight.storage in ("fp8", "fp4"):
        rows, columns = weight.shape
        return count + rows * ceil_div(columns, FP8_BLOCK)
    if weight.role in ("embed", "linear"):
        return count * itemsize
    return count * _FLOAT32


def _part(weight: Weight) -> str:
    """What a weight does, for a reader."""
    name = weight.name
    if name.startswith("mtp."):
        return "MTP block"
    if name.startswith(("embed.", "head.")):
        return "embedding and head"
    if ".ffn.experts." in name:
        return "routed experts"
    if ".shared_experts." in name:
        return "shared experts"
    if ".compressor." in name or ".indexer." in name:
        return "compressors and indexer"
    if ".attn." in name:
        return "attention"
    return "routing, hyper-connections and norms"


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
