"""`weft kernels`: the device ops, what would run each here and elsewhere, and why."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from weft.kernels.gpu.base import GLUON, Arch, arch_of, installed
from weft.kernels.gpu.ops import OPS
from weft.kernels.libraries import deep_gemm, flash_mla, flashinfer


def run(args: argparse.Namespace) -> int:
    here = arch_of("cuda", 0) if torch.cuda.is_available() else arch_of("cpu")
    arch: Arch = args.arch or here
    libraries = installed() if arch == here else installed() | {"triton", GLUON}
    console = Console()
    console.print(f"architecture {arch}{' (this machine)' if arch == here else ''}")
    table = Table("op", "shape", "runs", "because", "implementations", box=None, pad_edge=False)
    for op in OPS:
        for example in op.examples:
            choice = example.choose(arch, libraries)
            table.add_row(
                choice.op, example.label, choice.implementation, choice.why, ", ".join(op.implementations)
            )
    console.print(table)
    for name, reason in absences().items():
        console.print(f"{name}: {reason or 'usable'}")
    return 0


def absences() -> dict[str, str | None]:
    """Each optional library, and why it cannot be used here."""
    return {
        "triton": None if find_spec("triton") else "not installed (pip install 'weft[kernels]')",
        "flash_mla": flash_mla.absence(),
        "deep_gemm": deep_gemm.absence(),
    } | {f"flashinfer {module}": flashinfer.absence(module) for module in flashinfer.MODULES}
