"""What a card must hold, before anything is there, and which setting to lower if it cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from support.device import DEVICE, checkpoint, on_stored, pair
from weft.runtime.cache.capacity import Capacity, PoolSizes
from weft.runtime.config import ModelConfig, preset
from weft.runtime.errors import ConfigError
from weft.runtime.model.cuda.memory import MemoryPlan

GIB = 2**30


def plan(name: str = "flash", experts: str = "fp8", graphs: bool = True, **sizes: int) -> MemoryPlan:
    capacity = Capacity(preset(name), PoolSizes(**sizes), 2, "fp8", "fp8")
    return MemoryPlan(capacity, 512, experts, graphs)  # type: ignore[arg-type]


def test_weights_are_those_of_the_release() -> None:
    """V4-Flash: 156 GB as released, most of it experts; twice their codes as FP8. V4-Pro: 851 GB."""
    flash, wide = plan(experts="fp4"), plan(experts="fp8")
    assert 150e9 < sum(flash.weights.values()) < 165e9
    assert sum(wide.weights.values()) == pytest.approx(295e9, rel=0.05)
    assert flash.weights["routed experts"] > 0.85 * sum(flash.weights.values())
    assert sum(plan("pro", "fp4").weights.values()) == pytest.approx(860e9, rel=0.05)
    parts = {name for name in flash.weights if flash.weights[name] != wide.weights[name]}
    assert parts == {"routed experts", "MTP block"}


def held(thing: object, found: dict[int, int] | None = None) -> int:
    """Bytes of all weights below an object, each once; counters that kernels keep beside them are none."""
    found = {} if found is None else found
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            held(part, found)
    elif type(thing).__module__.startswith("weft.") and not isinstance(thing, ModelConfig):
        for name, part in vars(thing).items():
            if name not in ("locks", "rope"):
                held(part, found)
    return sum(found.values())


@pytest.mark.parametrize("experts", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_what_a_model_holds(experts: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, 0, 0, 4, 128)
    model = on_stored(found, dtype, experts=experts)
    capacity = Capacity(found.config, PoolSizes(), 4 if dtype == torch.float32 else 2, "fp8", "fp8")
    planned = sum(MemoryPlan(capacity, 512, experts).weights.values())  # type: ignore[arg-type]
    assert held(model) == pytest.approx(planned, rel=0.02)


def test_pools_are_what_they_allocate() -> None:
    _, device = pair(0)
    sizes = PoolSizes(tokens=500, slots=3, context=300, burst=100, page=7)
    pools = device.make_pools(sizes, "fp8", "fp4")
    capacity = Capacity(device.config, sizes, 4, "fp8", "fp4")
    tables = sum(table.nbytes for table in pools.tables.values())
    assert sum(MemoryPlan(capacity, 64).pools.values()) == pools.nbytes - tables


def test_a_report_names_every_part_and_what_is_free() -> None:
    whole = plan()
    report = dict(whole.report(141 * GIB))
    assert report["free on the card"] == "141.00 GiB"
    labels = [label.strip() for label, _ in whole.report(0)]
    for part in ("routed experts", "c4a indexer keys", "captured steps", "weights", "pools", "all"):
        assert part in labels
    assert "captured steps" not in plan(graphs=False).workspaces
    total = sum(sum(part.values()) for part in (whole.weights, whole.pools, whole.workspaces))
    assert total == whole.total


@pytest.mark.parametrize(
    ("sizes", "setting"),
    [
        ({"tokens": 50_000_000, "context": 1_000_000}, "tokens"),
        ({"tokens": 4096, "slots": 64, "checkpoints": 100_000}, "checkpoints"),
        ({"tokens": 4096, "slots": 100_000, "checkpoints": 10}, "slots"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(sizes: dict[str, int], setting: str) -> None:
    """With the most of that setting that does fit, which then is accepted."""
    big = plan(experts="fp4", **sizes)
    free = 180 * GIB
    with pytest.raises(ConfigError, match="would fit") as refused:
        big.check(free)
    assert refused.value.field == f"pools.{setting}" and refused.value.value == sizes[setting]
    fits = int(str(refused.value).split("; ")[1].split(" ")[0].replace(",", ""))
    lower = dataclasses.replace(big.capacity.sizes, **{setting: fits})
    fitting = dataclasses.replace(big, capacity=dataclasses.replace(big.capacity, sizes=lower))
    fitting.check(free)
    assert free - fitting.total < 2**27


def test_no_setting_of_pools_helps_a_card_that_is_too_small() -> None:
    with pytest.raises(ConfigError, match="whatever the pools") as refused:
        plan().check(24 * GIB)
    assert refused.value.field == "device"
    plan(tokens=4096, slots=2).check(400 * GIB)


@pytest.mark.gpu
def test_a_plan_holds_on_a_gpu() -> None:
    """What a small model and its pools take is not more than was planned."""
    assert DEVICE == "cuda"
    _, device = pair(1)
    before = torch.cuda.memory_allocated()
    pools = device.make_pools(PoolSizes(), "fp8", "fp8")
    planned = sum(MemoryPlan(Capacity(device.config, PoolSizes(), 4, "fp8", "fp8"), 512).pools.values())
    assert torch.cuda.memory_allocated() - before <= 1.01 * planned + 2**20
    del pools
