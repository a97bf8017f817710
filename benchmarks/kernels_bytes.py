"""Bytes that each op's kernels move, by count, beside the least possible; and times predicted from them.

    python benchmarks/kernels_bytes.py

Needs no GPU: Triton interprets the kernels, and each load and store adds the bytes of its unmasked elements.
Reads that a cache would serve count in full. Hopper's and Blackwell's own attention kernels cannot be interpreted;
theirs are counted from their loops. Predicted for an H200 (4.3 TB/s copied, 790 TFLOP/s bf16, measured on one) and
a B200 (8 TB/s, 2,000, by its datasheet): the larger of bytes over bandwidth and products over rate, plus a launch
of 2 us, per op and summed per layer of V4-Flash; whole steps are predicted by timeline.py. FlashMLA's published
figures stand beside.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from support.ops import CASES, Case
from support.record import record
from support.step_ops import STEP_CASES
from weft.kernels.gpu.attention import least_bytes
from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.interpreter import install, traffic
from weft.kernels.layouts import kv_fp8

# Rows per call: enough that what is read once per call (norms, tables) does not count for much.
TOKENS = {"decode": 4, "both": 8, "prefill": 512, "rare": 2}
BOUND = 1.3
CARDS = {"H200": (4.3e12, 790e12), "B200": (8.0e12, 2000e12)}
LAUNCH = 2e-6
# FlashMLA's own report for V3.2's shapes, and a third party's measurement of its fixed cost (FlagGems 5010).
PUBLISHED = {
    "FlashMLA sparse decode, H800": "410 TFLOP/s",
    "FlashMLA sparse decode, B200": "350 TFLOP/s",
    "FlashMLA fixed cost, b = 1": "28 us",
    "FlashMLA, window only, b = 32": "34 us",
}


def counted(case: Case) -> dict[str, float]:
    prepared = case.make(TOKENS[case.phase], "cpu")
    with traffic() as moved:
        prepared.run("triton")
    return {
        "rows": TOKENS[case.phase],
        "moved": moved.total,
        "least": prepared.least,
        "ratio": round(moved.total / prepared.least, 3),
    }


def by_formula() -> dict[str, dict[str, float]]:
    """Kernels that Triton cannot interpret, from their loops, at V4-Flash's c4a."""
    from weft.kernels.triton import attention_sm90, attention_sm100

    columns, pool = 640, Pages.empty(1, kv_fp8(64, 448, 64))
    least = least_bytes(1, columns, 64, pool, rope=64)
    counts = {
        "sparse attention, sm_90, an item a block": attention_sm90.moved([columns], 64, rope=64).total,
        "sparse attention, sm_90, a list a block": attention_sm90.moved([columns], 64, chunk=5, rope=64).total,
        "sparse attention, sm_100": attention_sm100.moved([columns], 64, rope=64).total,
    }
    return {
        name: {"moved": total, "least": least, "ratio": round(total / least, 3)} for name, total in counts.items()
    }


def predicted(case: Case, ratio: float, batch: int, card: str) -> float:
    """Microseconds of one call of `batch` rows. Bytes and products grow with rows; attention is two launches."""
    bandwidth, rate = CARDS[card]
    rows = TOKENS[case.phase]
    prepared = case.make(rows, "cpu")
    scale = batch / rows
    launches = 2 if case.name.startswith("sparse attention") else 1
    return round(
        1e6 * (launches * LAUNCH + max(prepared.least * ratio / bandwidth, prepared.flop / rate) * scale), 2
    )


def main() -> None:
    install()
    torch.manual_seed(0)
    counts, times = {}, {}
    for case in (*CASES, *STEP_CASES):
        name = f"{case.name} ({case.phase})"
        counts[name] = counted(case)
        print(f"{name:60} {counts[name]}", flush=True)
        if case in CASES and case.phase != "rare":
            times[name] = {
                card: {f"b={b}": predicted(case, counts[name]["ratio"], b, card) for b in (1, 32, 256)}
                for card in CARDS
            }
    layers = {
        kind: {
            card: {
                f"b={b}": round(
                    sum(
                        times[f"{c.name} ({c.phase})"][card][f"b={b}"]
                        for c in CASES
                        if letter in c.layers and c.phase in ("decode", "both")
                    ),
                    1,
                )
                for b in (1, 32, 256)
            }
            for card in CARDS
        }
        for kind, letter in (("window", "w"), ("c4a", "4"), ("c128a", "8"))
    }
    formulas = by_formula()
    over = {name: e["ratio"] for name, e in {**counts, **formulas}.items() if e["ratio"] > BOUND}
    record(
        "kernels_bytes",
        {
            "bytes": counts,
            "bytes by formula": formulas,
            f"over {BOUND}": over,
            "predicted us per op": times,
            "predicted us per layer, attention side, decode at 8k": layers,
            "published": PUBLISHED,
        },
    )


if __name__ == "__main__":
    main()
