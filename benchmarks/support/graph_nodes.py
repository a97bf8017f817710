"""What is in a captured CUDA graph: its nodes, and the names of its kernels, asked from the driver.

graph = torch.cuda.CUDAGraph(keep_graph=True)
with torch.cuda.graph(graph):
    step()
print(summary(nodes(graph)))
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {0: "kernel", 1: "memcpy", 2: "memset", 3: "host", 4: "graph", 5: "empty", 6: "wait", 7: "record"}
KINDS |= {10: "alloc", 11: "free"}


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2, with room for what later versions append."""

    _fields_ = (
        ("func", c_void_p),
        ("sizes", c_uint * 7),  # grid, block, dynamic shared memory
        ("params", c_void_p),
        ("extra", c_void_p),
        ("kern", c_void_p),
        ("ctx", c_void_p),
        ("more", c_void_p * 8),
    )


@dataclass(frozen=True)
class Node:
    """kind: one of KINDS' values, or a number. name: of a kernel, else empty."""

    kind: str
    name: str = ""


def nodes(graph: Any, driver: Any = None) -> list[Node]:
    """Nodes of a torch.cuda.CUDAGraph that was made with keep_graph=True, in the order of their capture. driver:
    the CUDA driver's functions, for tests."""
    driver = driver or ctypes.CDLL("libcuda.so.1")
    try:
        return _of_graph(c_void_p(graph.raw_cuda_graph()), driver)
    except _DriverError:  # a driver that is too old to name functions prints them nevertheless
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            graph.debug_dump(str(path))
            return from_dot(path.read_text())


def summary(found: Sequence[Node]) -> dict[str, int]:
    """How many of each kernel and of each other kind, in order of first appearance."""
    return dict(Counter(node.name or f"({node.kind})" for node in found))


class _DriverError(RuntimeError):
    pass


def _call(driver: Any, name: str, *arguments: Any) -> None:
    function = getattr(driver, name, None)
    if function is None:
        raise _DriverError(f"{name} is not there")
    function.restype = c_int
    code = function(*arguments)
    if code != 0:
        raise _DriverError(f"{name}: error {code}")


def _of_graph(graph: c_void_p, driver: Any) -> list[Node]:
    count = c_size_t(0)
    _call(driver, "cuGraphGetNodes", graph, None, byref(count))
    handles = (c_void_p * count.value)()
    if count.value:
        _call(driver, "cuGraphGetNodes", graph, handles, byref(count))
    found: list[Node] = []
    for handle in handles:
        kind = c_int(-1)
        _call(driver, "cuGraphNodeGetType", c_void_p(handle), byref(kind))
        if kind.value == 4:
            child = c_void_p()
            _call(driver, "cuGraphChildGraphNodeGetGraph", c_void_p(handle), byref(child))
            found += _of_graph(child, driver)
        else:
            name = _kernel_name(c_void_p(handle), driver) if kind.value == 0 else ""
            found.append(Node(KINDS.get(kind.value, str(kind.value)), name))
    return found


def _kernel_name(node: c_void_p, driver: Any) -> str:
    params, name = _KernelParams(), c_char_p()
    _call(driver, "cuGraphKernelNodeGetParams_v2", node, byref(params))
    if params.func:
        _call(driver, "cuFuncGetName", byref(name), c_void_p(params.func))
    else:
        _call(driver, "cuKernelGetName", byref(name), c_void_p(params.kern))
    return (name.value or b"?").decode()


def from_dot(text: str) -> list[Node]:
    """Nodes of what debug_dump writes, where a node's label begins with its kind in capitals; a kernel's name
    stands before its grid in escaped angle brackets."""
    found = []
    for label in re.findall(r'label="\{?\s*([A-Z][A-Z_ ]*.*?)"\s*\]', text, re.DOTALL):
        kind = re.match(r"[A-Z_ ]+", label)
        assert kind is not None
        name = re.search(r"\|\s*([^|{}\s\\]+)\\<\\<\\<", label)
        found.append(Node(kind[0].strip().lower(), name[1] if name else ""))
    return found
