"""Reading a captured graph's nodes, from a driver that is none."""

import ctypes
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

PATH = Path(__file__).parents[3] / "benchmarks" / "support" / "graph_nodes.py"


@pytest.fixture(scope="module")
def graph_nodes() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_graph_nodes", PATH)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def address(handle: Any) -> int:
    return handle.value


# Lists of (kind, value): of a kernel its CUfunction or, negative, its CUkernel; of a child a graph.
GRAPHS: dict[int, list[tuple[int, int]]] = {
    1 << 40: [(0, 11), (2, 0), (4, 1 << 41), (0, -12), (13, 0)],
    1 << 41: [(0, 11)],
    1 << 42: [],
}
NAMES = {11: b"_compress_c4", 12: b"attend"}


class Driver:
    """Its graphs and its functions' names are the two tables above."""

    def __init__(self) -> None:
        self.nodes: dict[int, tuple[int, int]] = {}

    def cuGraphGetNodes(self, graph: Any, handles: Any, count: Any) -> int:
        found = GRAPHS[address(graph)]
        if handles is not None:
            for i, node in enumerate(found):
                handles[i] = address(graph) + 64 * (i + 1)
                self.nodes[handles[i]] = node
        count._obj.value = len(found)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = self.nodes[address(node)][0]
        return 0

    def cuGraphChildGraphNodeGetGraph(self, node: Any, graph: Any) -> int:
        graph._obj.value = self.nodes[address(node)][1]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:
        value = self.nodes[address(node)][1]
        params._obj.func, params._obj.kern = (value, None) if value > 0 else (None, -value)
        return 0

    def cuFuncGetName(self, name: Any, function: Any) -> int:
        name._obj.value = NAMES[address(function)]
        return 0

    cuKernelGetName = cuFuncGetName


def of(driver: Driver) -> Any:
    """Its functions, which take attributes as those of ctypes do."""
    return SimpleNamespace(**{name: partial(getattr(driver, name)) for name in vars(Driver) if name[:2] == "cu"})


def test_nodes(graph_nodes: Any) -> None:
    graph = SimpleNamespace(raw_cuda_graph=lambda: 1 << 40)
    found = graph_nodes.nodes(graph, of(Driver()))
    kinds = [(node.kind, node.name) for node in found]
    assert kinds == [
        ("kernel", "_compress_c4"),
        ("memset", ""),
        ("kernel", "_compress_c4"),
        ("kernel", "attend"),
        ("13", ""),
    ]
    assert graph_nodes.summary(found) == {"_compress_c4": 2, "(memset)": 1, "attend": 1, "(13)": 1}
    assert graph_nodes.nodes(SimpleNamespace(raw_cuda_graph=lambda: 1 << 42), of(Driver())) == []


def test_an_old_driver_prints_the_graph(graph_nodes: Any) -> None:
    dot = r"""digraph dot {
subgraph cluster_1 {
label="graph_1" graph[style="dashed"];
"graph_1_node_0"[style="bold" shape="record" label="{KERNEL
| {ID | 0 (topoId: 1) | _Z6kernelPf\<\<\<4,1,128\>\>\>}
| {{node handle | func handle} | {0x0055 | 0x0056}}
}"];
"graph_1_node_1"[style="solid" shape="record" label="{
MEMSET
| {{ID | node handle} | {1 (topoId: 0) | 0x0057}}
}"];
"graph_1_node_0" -> "graph_1_node_1";
}
}
"""
    driver = of(Driver())
    del driver.cuFuncGetName
    graph = SimpleNamespace(
        raw_cuda_graph=lambda: 1 << 40, debug_dump=lambda path: Path(path).write_text(dot) and None
    )
    found = graph_nodes.nodes(graph, driver)
    assert [(node.kind, node.name) for node in found] == [("kernel", "_Z6kernelPf"), ("memset", "")]


def test_handles_are_pointers(graph_nodes: Any) -> None:
    assert ctypes.sizeof(graph_nodes._KernelParams) == 8 + 28 + 4 + 4 * 8 + 8 * 8


@pytest.mark.gpu
def test_of_a_captured_graph(graph_nodes: Any) -> None:
    x = torch.ones(1000, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        y = x.mul(2)
        y.add_(1)
        z = torch.empty_like(y).copy_(y)
    found = graph_nodes.nodes(graph)
    assert [node.kind for node in found[:2]] == ["kernel", "kernel"] and all(node.name for node in found[:2])
    assert len(found) == 3  # a copy is a memcpy, or a kernel
    graph.replay()
    assert bool((z == 5).all())
