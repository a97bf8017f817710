"""Where cores are made: from a model in memory, or from a checkpoint in a process of their own."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch

from weft.kernels.gpu.base import arch_of
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.config import ModelConfig
from weft.runtime.engine import messages as m
from weft.runtime.engine.child import check_driver
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.core import Core
from weft.runtime.engine.link import MakeCore, run_core
from weft.runtime.errors import ConfigError
from weft.runtime.model.base import Network
from weft.runtime.model.cuda.memory import ExpertFormat, MemoryPlan
from weft.runtime.model.model import Model
from weft.runtime.model.weights import Draining
from weft.runtime.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
_log = logging.getLogger("weft")


def load_model(path: Path, config: EngineConfig, progress: Progress | None = None) -> Network:
    """Read a checkpoint; its tensors are let go one by one as the model takes them."""
    check_device(config)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    checkpoint = Checkpoint.open(path)
    for notice in checkpoint.notices:
        _log.warning("%s: %s", path, notice)
    exact = config.is_deterministic
    if config.device == "cuda":
        from weft.runtime.model.cuda.model import DeviceModel
        from weft.runtime.model.cuda.weights import default_format

        experts = config.experts or default_format(arch_of("cuda"))
        _plan_memory(checkpoint.config, config, experts)
        return DeviceModel(
            checkpoint.config,
            checkpoint.stored(progress),
            dtype=dtype,
            device="cuda",
            deterministic=exact,
            graphs=config.graphs,
            experts=experts,
        )
    weights = Draining(dict(checkpoint.load(dtype, progress)))
    return Model(checkpoint.config, weights, dtype=dtype, quant_sim=config.quant_sim, deterministic=exact)


def _plan_memory(model: ModelConfig, config: EngineConfig, experts: ExpertFormat) -> None:
    """Print what will be on the card; raises `ConfigError` if that is more than there is."""
    plan = MemoryPlan(config.capacity(model), config.limits.chunk, experts, graphs=config.graphs)
    free, _ = torch.cuda.mem_get_info()
    for label, value in plan.report(free):
        print(f"weft: {label:<42} {value:>12}", file=sys.stderr, flush=True)
    plan.check(free)


def _capture(core: Core) -> None:
    """Capture decode steps now, so that no request waits for it."""
    from weft.runtime.model.cuda.model import DeviceModel

    if isinstance(core.model, DeviceModel) and isinstance(core.pools, DevicePools):
        started = time.perf_counter()
        held, seconds = core.model.prepare(core.pools), time.perf_counter() - started
        print(f"weft: {held} decode steps captured in {seconds:.1f} s", file=sys.stderr, flush=True)


def check_device(config: EngineConfig) -> None:
    """Raises `ConfigError` if this machine lacks what the device needs."""
    check_driver(config)
    if config.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ConfigError("device", config.device, "torch sees no NVIDIA GPU")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):  # Triton converts to e4m3 from there on
        raise ConfigError("device", config.device, "compute capability {}.{}, 8.9 is needed".format(*capability))


def core_maker(model: Network, tokenizer: Tokenizer, config: EngineConfig) -> MakeCore:
    """Cores over one model, each with pools of its own."""

    def make(on_event: Callable[[m.Event], None]) -> Core:
        pools = model.make_pools(config.pools, *config.formats)
        return Core(model, pools, tokenizer, config.limits, on_event)

    return make


def serve(pipe: Connection, path: Path, config: EngineConfig) -> None:
    """The main function of a core's process: load the checkpoint, then run until the front stops it or is gone."""
    # Ctrl-C is for the front: it closes the engine in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    events: list[m.Event] = []
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(m.Request)

    def flush() -> None:
        if events:
            pipe.send_bytes(encoder.encode(events))
            events.clear()

    def receive(block: bool) -> m.Request | None:
        flush()
        if not block and not pipe.poll():
            return None
        try:
            message: m.Request = decoder.decode(pipe.recv_bytes())
            return message
        except EOFError:  # nobody is left who could ask for anything
            return m.Stop()

    def progress(done: int, total: int, shard: str) -> None:
        events.append(m.Loading(done, total, shard))
        flush()

    model = load_model(path, config, progress)
    core = core_maker(model, Tokenizer.load(path), config)(events.append)
    if config.device == "cuda" and config.graphs:
        _capture(core)
    run_core(core, receive)
    flush()
