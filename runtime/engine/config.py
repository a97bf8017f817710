"""How to run a model: numbers, memory and limits. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.runtime.cache.capacity import Capacity, IndexFormat, KvFormat, PoolSizes
from weft.runtime.config import ModelConfig
from weft.runtime.errors import ConfigError
from weft.runtime.model.cuda.memory import ExpertFormat

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]

# What None stands for on each device.
_KV: dict[Device, KvFormat] = {"cpu": "model", "cuda": "fp8"}
_INDEX: dict[Device, IndexFormat] = {"cpu": "model", "cuda": "fp8"}


@dataclass(frozen=True)
class CoreLimits:
    """chunk: prefill tokens per step over all sequences. queue: calls accepted and not finished.
    drafts: tokens that the MTP block may guess per step and call, 0 to 7; with 0, what a grammar makes certain is
    not drafted either.
    restarts: times a core that died is replaced before the engine gives up."""

    chunk: int = 512
    drafts: int = 1
    queue: int = 1024
    restarts: int = 5


@dataclass(frozen=True)
class EngineConfig:
    """device: "cpu", or "cuda" for one NVIDIA GPU, through Triton (`weft.runtime.model.cuda`). dtype: of weights
    and streams. quant_sim: round KV as the released model does; on cuda it always is. deterministic: results do
    not depend on batch, chunks or forks, to the bit; False trades that for speed: on CPUs in the linears,
    everywhere in drafts, which are then accepted by rejection sampling. None: True. graphs: on cuda, decode
    steps are captured as graphs and replayed. experts: on cuda, how experts that are released in FP4 are held:
    "fp8" has exactly their values and takes twice the memory; None: "fp4" where the architecture multiplies it,
    else "fp8". kv_format, index_format: how rows are stored; "model" is the dtype, fp8 and fp4 are the released
    layouts. None: "model" on CPUs, "fp8" on cuda, where "model" is not to be had. pools: KV memory. threads: of a
    core in its own process; None leaves torch's default.
    """

    device: Device = "cpu"
    dtype: Dtype = "float32"
    quant_sim: bool = False
    deterministic: bool | None = None
    kv_format: KvFormat | None = None
    index_format: IndexFormat | None = None
    graphs: bool = True
    experts: ExpertFormat | None = None
    pools: PoolSizes = field(default_factory=PoolSizes)
    limits: CoreLimits = field(default_factory=CoreLimits)
    threads: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "device": ("cpu", "cuda"),
            "dtype": ("float32", "bfloat16"),
            "kv_format": (None, "model", "fp8"),
            "index_format": (None, "model", "fp8", "fp4"),
            "experts": (None, "fp8", "fp4"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(name, getattr(self, name), f"must be one of {', '.join(filter(None, allowed))}")
        if self.device == "cuda":
            self._check_cuda()
        for owner, names in (("pools", "tokens slots context burst page"), ("limits", "chunk queue")):
            for name in names.split():
                value = getattr(getattr(self, owner), name)
                if value < 1:
                    raise ConfigError(f"{owner}.{name}", value, "must be at least 1")
        if not 0 <= self.limits.drafts <= 7:
            raise ConfigError("limits.drafts", self.limits.drafts, "not in 0..7")
        if self.pools.checkpoints < 0:
            raise ConfigError("pools.checkpoints", self.pools.checkpoints, "must not be negative")
        if self.pools.burst < self.limits.chunk:
            raise ConfigError("pools.burst", self.pools.burst, f"below limits.chunk {self.limits.chunk}")

    def _check_cuda(self) -> None:
        for name in ("kv_format", "index_format"):
            if getattr(self, name) == "model":
                raise ConfigError(name, "model", "on cuda rows are in the released layouts: fp8, or fp4 keys")

    @property
    def is_deterministic(self) -> bool:
        return self.deterministic is not False

    @property
    def formats(self) -> tuple[KvFormat, IndexFormat]:
        """Of KV rows and of indexer keys."""
        return self.kv_format or _KV[self.device], self.index_format or _INDEX[self.device]

    def capacity(self, config: ModelConfig) -> Capacity:
        """What the pools will take and hold for a model."""
        itemsize = 4 if self.dtype == "float32" else 2
        return Capacity(config, self.pools, itemsize, *self.formats)
