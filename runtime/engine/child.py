"""What a core's process is started with: plain data, so that a front which starts one need not import torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from weft.runtime import env
from weft.runtime.engine.config import EngineConfig
from weft.runtime.errors import ConfigError


@dataclass(frozen=True)
class CoreProcess:
    """Runs `host.serve` in the spawned process. Pickled, hence a checkpoint's path rather than a model."""

    path: Path
    config: EngineConfig

    def __call__(self, pipe: Connection) -> None:
        if self.config.threads is not None:
            env.limit_blas_threads(self.config.threads)  # before numpy is imported
        import_module("weft.runtime.engine.host").serve(pipe, self.path, self.config)


def check_driver(config: EngineConfig) -> None:
    """Raises `ConfigError` if this machine plainly lacks what the device needs, as far as can be told without
    torch: a core's process could only die of it."""
    if config.device == "cpu":
        return
    if find_spec("triton") is None:
        raise ConfigError("device", config.device, "Triton is not installed (pip install triton)")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ConfigError("device", config.device, "there is no NVIDIA driver here (libcuda.so.1)") from None
