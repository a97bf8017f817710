"""What grammars cost: compiling, masks, and how much of either a step waits for.

    python benchmarks/grammars.py [--schemas tests/data/json_schema_test_suite/draft2020-12.json]

Every schema of JSON-Schema-Test-Suite that is not refused, and one of six fields such as tools have: the time to
compile it, and that of each mask along a random walk of up to 40 tokens (no cache, embedded model's tokenizer).
Then 16 outputs at a time held to the tool's schema on the embedded model, with and without drafts: when threads
computed masks, when the model computed tokens, and how long the core waited for masks. A timeline of some steps is
kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.record import record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.decoding import grammar as module
from weft.runtime.decoding.grammar import Constraint, Grammars
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.core import Core
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer

SUITE = Path(__file__).parent.parent / "tests/data/json_schema_test_suite/draft2020-12.json"
TOGETHER, SHOWN = 16, 4
TOOL = {
    "type": "object",
    "properties": {
        "destination_city": {"type": "string", "maxLength": 12},
        "number_of_passengers": {"type": "integer", "minimum": 1, "maximum": 999},
        "preferred_color": {"enum": ["red", "green", "blue"]},
        "confirmed_by_customer": {"type": "boolean"},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        "contact": {"type": "object", "properties": {"room": {"type": "integer"}}, "required": ["room"]},
    },
    "required": [
        "destination_city",
        "number_of_passengers",
        "preferred_color",
        "confirmed_by_customer",
        "contact",
    ],
    "additionalProperties": False,
}
Interval = tuple[float, float]


def quantiles(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    at = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(values, q)), digits) for name, q in at.items()} | {
        "count": len(values)
    }


def compiled(schemas: Sequence[Any]) -> dict[str, Any]:
    """Milliseconds to compile, and microseconds per mask."""
    tokenizer = Tokenizer.load(TOKENIZER)
    grammars, rng = Grammars(tokenizer), random.Random(0)
    compiling, masks = [], []
    refused = 0
    for schema in schemas:
        started = time.perf_counter()
        try:
            matcher = grammars._compile(Grammar("json_schema", json.dumps(schema)))
        except RequestError:
            refused += 1
            continue
        compiling.append(1e3 * (time.perf_counter() - started))
        for _ in range(40):
            started = time.perf_counter()
            (mask,) = module._masks(matcher, [], tokenizer.size, [])
            masks.append(1e6 * (time.perf_counter() - started))
            allowed = np.flatnonzero(mask)
            if not len(allowed) or not matcher.consume_token(int(rng.choice(allowed))) or matcher.is_stopped():
                break
    grammars.close()
    return {"compile ms": quantiles(compiling), "mask us": quantiles(masks), "refused": refused}


class Watch:
    """Notes when masks are computed, when the core waits for one, and when steps compute tokens."""

    def __init__(self) -> None:
        self.masks: list[Interval] = []
        self.waits: list[Interval] = []
        self.steps: list[Interval] = []
        own = module._masks, Constraint.mask, Core._forward
        module._masks = self._noting(own[0], self.masks)
        Constraint.mask = self._noting(own[1], self.waits)  # type: ignore[method-assign]
        Core._forward = self._noting(own[2], self.steps)  # type: ignore[method-assign]
        self._own = own

    def stop(self) -> None:
        module._masks, Constraint.mask, Core._forward = self._own  # type: ignore[method-assign]

    @staticmethod
    def _noting(function: Any, into: list[Interval]) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                into.append((started, time.perf_counter()))

        return noted


def per_step(steps: Sequence[Interval], intervals: Sequence[Interval], *, within: bool) -> list[float]:
    """Milliseconds of the intervals from each step's beginning to the next one's, or within the step itself."""
    ends = [s[1] for s in steps] if within else [s[0] for s in steps[1:]] + [steps[-1][1]]
    return [
        1e3 * sum(max(0.0, min(b, end) - max(a, start)) for a, b in intervals)
        for (start, _), end in zip(steps, ends, strict=True)
    ]


async def outputs(engine: Engine, seed: int) -> None:
    params = SamplingParams(
        max_tokens=96, temperature=0.8, seed=seed, grammar=Grammar("json_schema", json.dumps(TOOL))
    )
    prompts = [engine.tokenizer.encode(f"Customer {i} of {seed}: ") for i in range(TOGETHER)]
    await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))


def timeline(drafts: int) -> dict[str, Any]:
    pools = PoolSizes(tokens=32768, slots=2 * TOGETHER, context=4096)
    config = EngineConfig(limits=CoreLimits(drafts=drafts), pools=pools)
    with Engine.embedded(config) as engine:
        asyncio.run(outputs(engine, 0))
        watch = Watch()
        for seed in range(1, 4):
            asyncio.run(outputs(engine, seed))
        watch.stop()
    steps = watch.steps
    lengths = [1e3 * (b - a) for a, b in zip([s[0] for s in steps], [s[0] for s in steps[1:]], strict=False)]
    waits, work = (per_step(steps, own, within=False) for own in (watch.waits, watch.masks))
    during = per_step(steps, watch.masks, within=True)
    first = len(steps) // 2
    shown = steps[first : first + SHOWN]
    zero, end = shown[0][0], steps[first + SHOWN][0]

    def part(intervals: Sequence[Interval]) -> list[list[float]]:
        return [[round(1e3 * (t - zero), 3) for t in own] for own in intervals if zero <= own[0] < end]

    return {
        "steps": len(steps),
        "step ms": quantiles(lengths, 2),
        "mask work per step ms": quantiles(work, 3),
        "of it while tokens were computed": round(sum(during) / sum(work), 3),
        "core waits for masks per step ms": quantiles(waits, 3),
        "share of a step waited": round(statistics.median(waits) / statistics.median(lengths), 4),
        "timeline ms": {"steps": part(steps), "masks": part(watch.masks), "waits": part(watch.waits)},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=Path, default=SUITE)
    parser.add_argument("--name", default="grammars")
    args = parser.parse_args()
    suite = json.loads(args.schemas.read_text())
    schemas = [group["schema"] for groups in suite.values() for group in groups]
    figures: dict[str, Any] = {"suite": compiled(schemas), "tool": compiled([TOOL] * 50)}
    for drafts in (0, 1):
        figures[f"{TOGETHER} at a time, {drafts} drafts"] = timeline(drafts)
    record(args.name, figures)


if __name__ == "__main__":
    main()
