"""The attention side's ops on a GPU, beside FlashMLA and DeepGEMM, and against what the card can do.

    python benchmarks/kernels_gpu.py [--quick]

CUDA graphs over inputs that together exceed L2, medians of replays. Each op's time stands beside its least
time: the larger of its least bytes over the copy bandwidth and its products over the bf16 rate, both measured
in the same run. Peers (`sgl-flash-mla` 1.0.0, `sgl-deep-gemm` 0.1.5) run in the same process on the same
inputs, where they are installed. That results are right is the business of tests/kernels/gpu, which run on a
GPU where there is one. Without a GPU it says so and writes nothing: benchmarks/results/kernels_gpu.json is of
the last run on one.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from support.gpu import ceilings, device, microseconds, sets
from support.ops import CASES, LONG, Case
from support.record import record
from support.step_ops import STEP_CASES
from weft.kernels.gpu.base import arch_of, installed
from weft.kernels.gpu.ops import OPS
from weft.kernels.libraries import deep_gemm, flash_mla

LIBRARIES = {"flash_mla": flash_mla, "deep_gemm": deep_gemm}
BATCHES = {"decode": (1, 8, 32, 64, 128, 256), "both": (1, 32, 256, 2048), "prefill": (512, 2048), "rare": (1, 16)}
_LARGEST = {"index logits, 32,768 keys (128k)": 64, "experts, FP4": 32}


def timed(case: Case, rows: int, limits: dict[str, float]) -> dict[str, Any]:
    first = case.make(rows, "cuda")
    prepared = [first, *(case.make(rows, "cuda") for _ in range(sets(first.least, 2, 12) - 1))]
    floor = max(first.least / limits["copy TB/s"] / 1e6, first.flop / limits["bf16 TFLOP/s"] / 1e6)
    out: dict[str, Any] = {"least us": round(floor, 2)}
    out["ours"] = round(microseconds([partial(p.run, None) for p in prepared]), 2)
    for name in first.peers:
        out[name] = round(microseconds([p.peers[name] for p in prepared]), 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the first and last batch only")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        sys.exit("not run: there is no GPU here")
    torch.manual_seed(0)
    limits = ceilings()
    print(device(), limits, flush=True)
    absent = {name: library.absence() for name, library in LIBRARIES.items()}
    results: dict[str, Any] = {}
    for case in (*CASES, *LONG, *STEP_CASES):
        batches = [b for b in BATCHES[case.phase] if b <= _LARGEST.get(case.name, b)]
        for rows in (batches[0], batches[-1]) if quick else batches:
            row = timed(case, rows, limits)
            results.setdefault(f"{case.name} ({case.phase})", {})[f"{rows} rows"] = row
            print(f"{case.name:52} {case.phase:8} {rows:5} {row}", flush=True)
    kind = arch_of("cuda", 0)
    record(
        "kernels_gpu",
        {
            "device": device(),
            "ceilings": limits,
            "peers absent": {name: reason for name, reason in absent.items() if reason},
            "us": results,
            "choices": [str(e.choose(kind, installed())) for op in OPS for e in op.examples],
        },
    )


if __name__ == "__main__":
    main()
