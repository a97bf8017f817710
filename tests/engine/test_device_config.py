"""What `EngineConfig(device="cuda")` stands for, and what is refused of it, by name."""

from __future__ import annotations

import asyncio

import pytest
import torch

from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.config import preset
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import child, host
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine
from weft.runtime.errors import ConfigError


def test_what_none_stands_for() -> None:
    cpu, cuda = EngineConfig(), EngineConfig(device="cuda")
    assert cpu.formats == ("model", "model") and cpu.is_deterministic
    assert cuda.formats == ("fp8", "fp8") and cuda.is_deterministic and cuda.graphs
    assert EngineConfig(device="cuda", index_format="fp4").formats == ("fp8", "fp4")
    assert not EngineConfig(deterministic=False).is_deterministic
    assert EngineConfig(device="cuda", deterministic=True).is_deterministic
    assert cuda.capacity(preset("tiny")).kv_format == "fp8"


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "tpu"), ("kv_format", "model"), ("index_format", "model")],
)
def test_what_cuda_cannot_do_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig(**({"device": "cuda"} | {field: value}))  # type: ignore[arg-type]
    assert refused.value.field == field and refused.value.value == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_engine_says_so() -> None:
    """Before a process is started, too."""
    for process in (False, True):
        with pytest.raises(ConfigError, match="NVIDIA"):
            Engine(EMBEDDED, config=EngineConfig(device="cuda"), process=process)


def test_a_machine_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cuda")
    monkeypatch.setattr(child.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no NVIDIA GPU"):
        host.check_device(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match="capability 7"):
        host.check_device(config)
    monkeypatch.setattr(child, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Triton is not installed"):
        host.check_device(config)


def test_memory_is_planned_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And printed, also where it does not fit."""
    monkeypatch.setattr(host, "check_device", lambda config: None)
    monkeypatch.setattr(host, "arch_of", lambda kind: "sm90")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    with pytest.raises(ConfigError) as refused:
        host.load_model(EMBEDDED, EngineConfig(device="cuda", pools=PoolSizes(tokens=500_000_000, context=4096)))
    assert refused.value.field == "pools.tokens"
    printed = capsys.readouterr().err
    assert "routed experts" in printed and "free on the card" in printed and "1.00 GiB" in printed


@pytest.mark.gpu
def test_an_engine_on_a_gpu() -> None:
    with Engine(EMBEDDED, config=EngineConfig(device="cuda", dtype="bfloat16")) as engine:
        output = asyncio.run(engine.generate("Hello", SamplingParams(max_tokens=8, temperature=0.0)))
    assert output.tokens
