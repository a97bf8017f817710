"""Compile every kernel for Hopper and Blackwell, without either, and judge what came out.

    python benchmarks/kernels_compile.py [MODULE ...]

Registers, spills, shared memory, TMEM columns, expected instructions, no bare traps. Triton caches what it has
compiled. Exits with 1 if a kernel may not ship; with no module named, writes
benchmarks/results/kernels_compile.json.
"""

from __future__ import annotations

import pkgutil
import sys
import time
from importlib import import_module
from typing import Any

import triton

import weft.kernels.triton
from support.record import record
from weft.kernels.gpu.aot import AotCase, compile_case
from weft.kernels.gpu.base import Arch


def judged(case: AotCase, arch: Arch) -> dict[str, Any]:
    started = time.perf_counter()
    compiled = compile_case(case, arch)
    return {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "spill budget": case.spills,
        "shared": compiled.shared,
        "tmem columns": compiled.tmem,
        "expected": list(case.expect.get(arch, ())),
        "faults": compiled.faults(case),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    names = sys.argv[1:] or [m.name for m in pkgutil.iter_modules(weft.kernels.triton.__path__)]
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        module = import_module(f"weft.kernels.triton.{name}")
        for case in module.aot() if hasattr(module, "aot") else ():
            table[case.name] = {arch: judged(case, arch) for arch in case.archs}
            for arch, row in table[case.name].items():
                print(f"{case.name:50} {arch:6} " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if not sys.argv[1:]:
        run = "compiled on a machine without a GPU; nothing here was run"
        record("kernels_compile", {"triton": triton.__version__, "state": run, "kernels": table})
    if any(row["faults"] for kernel in table.values() for row in kernel.values()):
        sys.exit("some kernels may not ship")


if __name__ == "__main__":
    main()
