"""Compiling kernels for an architecture without having it, and reading what came out.

Only in a process where Triton does not interpret. Every module of `weft.kernels.triton` lists what to compile in a
function `aot()`, with real sizes: those are what `make kernels-compile` compiles and judges.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.kernels.gpu.base import Arch

CAPABILITY: dict[Arch, int] = {"sm89": 89, "sm90": 90, "sm100": 100, "sm120": 120}
# What a thread block may have on both Hopper and Blackwell; more TMEM columns compile to a bare trap.
SHARED_BYTES = 232448
TMEM_COLUMNS = 512


@dataclass(frozen=True)
class AotCase:
    """One kernel at one set of sizes.

    signature: argument -> Triton type ("*u8", "*fp32", "i32", "constexpr"). aligned: arguments that are
    multiples of 16, as launches specialise them; None: every pointer. expect: per architecture, patterns of
    which each must be found in PTX or SASS. spills: bytes of spilled registers that are accepted. options: more
    for the compiler.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    archs: tuple[Arch, ...] = ("sm90", "sm100")
    expect: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spills: int = 0
    aligned: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case for one architecture."""

    name: str
    arch: Arch
    registers: int
    spills: int
    shared: int
    tmem: int
    missing: tuple[str, ...]
    traps: bool
    ptx: str
    sass: str

    def faults(self, case: AotCase) -> list[str]:
        """Why it may not ship; empty if it may."""
        faults = [f"expected instruction {pattern!r} not found" for pattern in self.missing]
        if self.spills > case.spills:
            faults.append(f"{self.spills} bytes of spills, budget {case.spills}")
        if self.shared > SHARED_BYTES:
            faults.append(f"{self.shared} bytes of shared memory, {SHARED_BYTES} at most")
        if self.tmem > TMEM_COLUMNS:
            faults.append(f"{self.tmem} TMEM columns, {TMEM_COLUMNS} at most")
        if self.traps:
            faults.append("the body is a bare trap")
        return faults


def compile_case(case: AotCase, arch: Arch) -> Compiled:
    """Compile for `arch`; raises what Triton or ptxas raise."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", CAPABILITY[arch], 32)
    options = {"num_warps": case.warps, "num_stages": case.stages, **case.options}
    kernel = triton.compile(_source(case), target=target, options=options)
    sass, usage = _disassemble(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    missing = tuple(p for p in case.expect.get(arch, ()) if not re.search(p, ptx) and not re.search(p, sass))
    return Compiled(
        case.name,
        arch,
        registers=usage.get("REG", 0),
        spills=_spilled(sass, usage),
        shared=kernel.metadata.shared,
        tmem=getattr(kernel.metadata, "tmem_size", 0) or 0,
        missing=missing,
        traps=_is_trap(ptx),
        ptx=ptx,
        sass=sass,
    )


def _source(case: AotCase) -> Any:
    """Pointers count as 16-byte aligned, as torch's allocations are."""
    aligned = case.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    names = list(case.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    gluon = type(case.kernel).__name__ == "GluonJITFunction"
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    return Source(case.kernel, dict(case.signature), constexprs=dict(case.constexprs), attrs=attributes)


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """SASS, and the resource usage that the assembler noted."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run(tools / "nvdisasm", ["-c", file.name])
        usage = _run(tools / "cuobjdump", ["-res-usage", file.name])
    return sass, {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def _run(tool: Path, arguments: Sequence[str]) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _spilled(sass: str, usage: Mapping[str, int]) -> int:
    """Bytes of the stack frame that registers are spilled to; none without instructions that reach it."""
    return usage.get("STACK", 0) if re.search(r"\b(STL|LDL)\b", sass) else 0


def _is_trap(ptx: str) -> bool:
    """Whether the kernel is nothing but a trap: what Triton emits for too many TMEM columns."""
    body = ptx[ptx.find(".entry") :]
    return "trap;" in body and len(re.findall(r";", body)) < 40
