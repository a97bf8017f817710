"""What a core's process is started with: plain data, so that a front which starts one need not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from weft.runtime import env
from weft.runtime.engine.config import EngineConfig


@dataclass(frozen=True)
class CoreProcess:
    """Runs `host.serve` in the spawned process. Pickled, hence a checkpoint's path rather than a model."""

    path: Path
    config: EngineConfig

    def __call__(self, pipe: Connection) -> None:
        if self.config.threads is not None:
            env.limit_blas_threads(self.config.threads)  # before numpy is imported
        import_module("weft.runtime.engine.host").serve(pipe, self.path, self.config)
