"""The predicted time of one decode step of DeepSeek-V4-Flash, op by op, beside its roofline and what was measured.

    python benchmarks/timeline.py [--launch-us 2]

Needs no GPU: `support/timeline.py` says what is predicted and from what. At batch 1, 32 and 256 and contexts of 8k
and 128k tokens, for an H200 and a B200, with experts as released (FP4) and as FP8 that holds the same values. The
roofline is the bytes that a step cannot do without over the card's bandwidth. Writes timeline.json to
benchmarks/results and, where matplotlib is installed (extra `bench`), timeline.svg. step_gpu.json there, if
`step_gpu.py` has written one, is drawn beside the prediction.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import argparse
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from support.record import RESULTS, record
from support.timeline import BATCHES, CARDS, CONTEXTS, KINDS, Step, layer, rest, roofline, totals, whole
from support.timeline_counts import Count, count_all
from weft.kernels.gpu.interpreter import install
from weft.kernels.reference.experts import random_experts
from weft.runtime.config import ModelConfig


def predicted(counts: Mapping[str, Count], launch: float) -> dict[str, Any]:
    """Card -> context -> format of the experts -> batch -> microseconds."""
    config = ModelConfig()
    sizes = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    formats = {name: random_experts(name, *sizes, "meta") for name in ("fp8", "fp4")}
    return {
        card: {
            context: {
                name: {
                    str(batch): _step(Step(config, card, batch, length, experts, counts), launch)
                    for batch in BATCHES
                }
                for name, experts in formats.items()
            }
            for context, length in CONTEXTS.items()
        }
        for card in CARDS
    }


def _step(step: Step, launch: float) -> dict[str, Any]:
    card = CARDS[step.card]
    items = whole(step)
    groups = totals(items, card, launch)
    time, least = sum(groups.values()), roofline(step)
    per_kind = {kind: totals(layer(kind, step), card, launch) for kind in KINDS}
    return {
        "step us": round(time, 1),
        "roofline us": round(1e6 * least / card.bandwidth, 1),
        "roofline GB": round(least / 1e9, 2),
        "tokens/s": round(1e6 * step.batch / time),
        "launches": sum(item.launches for item in items),
        "us by op": _rounded(groups),
        "layers": {
            kind: {
                "us": round(sum(parts.values()), 2),
                "launches": sum(item.launches for item in layer(kind, step)),
                "us by op": _rounded(parts),
            }
            for kind, parts in per_kind.items()
        },
        "rest us": round(sum(totals(rest(step), card, launch).values()), 1),
    }


def _rounded(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in parts.items()}


def measured() -> dict[str, Any] | None:
    path = RESULTS / "step_gpu.json"
    return json.loads(path.read_text())["figures"] if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch-us", type=float, default=2.0, help="of a kernel in a CUDA graph")
    launch = parser.parse_args().launch_us
    install()
    torch.manual_seed(0)
    counts = count_all()
    figures = predicted(counts, launch * 1e-6)
    table = {
        name: {"bytes over least": round(count.ratio, 3), "kernels": list(count.kernels)}
        for name, count in counts.items()
    }
    record("timeline", {"launch us": launch, "ops": table, "predicted": figures})
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return
    from support.timeline_plot import draw

    draw(figures, launch, measured(), RESULTS / "timeline.svg")


if __name__ == "__main__":
    main()
