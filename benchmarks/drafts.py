"""What drafts by the MTP block bring on the embedded model, and what they cost where they are wrong.

    python benchmarks/drafts.py [--turns 5]

Three kinds of calls, 1, 4 and 16 at a time: held-out dialogues (their last turn, greedy), the same prompts with
their answers held to a JSON schema of four fields, and text that nobody can guess (drawn at temperature 3). Each
with 0, 1 and 2 drafts at most, in turn within one process; medians. The tokens are the same at every depth, or it
stops. Per row: tokens a second, the ratio to no drafts, drafts and how many of them were right; tokens of a call
per step, what a step with all calls in it costs beside one without drafts, and how the ratio compares with the
quotient of the two, which is what drafts can bring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from support.record import record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.embedded.data import TASKS
from weft.runtime.embedded.scoring import held_out, turns
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.core import Core
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Output
from weft.runtime.engine.schedule import Scheduler, Work
from weft.runtime.text.chat import render

DEPTHS = (0, 1, 2)
SCHEMA = {
    "type": "object",
    "properties": {
        "destination_city": {"type": "string", "maxLength": 12},
        "number_of_passengers": {"type": "integer", "minimum": 1, "maximum": 999},
        "preferred_color": {"enum": ["red", "green", "blue"]},
        "confirmed_by_customer": {"type": "boolean"},
    },
    "required": ["destination_city", "number_of_passengers", "preferred_color", "confirmed_by_customer"],
    "additionalProperties": False,
}
KINDS = {
    "dialogues": SamplingParams(max_tokens=160, temperature=0),
    "json": SamplingParams(max_tokens=160, temperature=0, grammar=Grammar("json_schema", json.dumps(SCHEMA))),
    "unguessable": SamplingParams(max_tokens=96, temperature=3.0, seed=1, ignore_eos=True),
}


def prompts(engine: Engine, count: int) -> list[list[int]]:
    examples = [example for i in range(8) for task in TASKS for example in held_out(task, 1, seed=100 + i)]
    asked = [(example, scored) for example, scored in turns(examples) if scored.thinking or example.tools]
    return [
        render(engine.tokenizer, e.messages[: s.turn], thinking=s.thinking, tools=e.tools).tokens
        for e, s in asked[:count]
    ]


async def run(
    engine: Engine, texts: list[list[int]], params: SamplingParams, together: int
) -> tuple[float, list[Output]]:
    """Seconds, and outputs; prompts are computed before the clock starts."""
    sequences = [engine.open(text) for text in texts]
    for sequence in sequences:
        await sequence.complete(SamplingParams(max_tokens=0))
    limit = asyncio.Semaphore(together)

    async def one(sequence: Any) -> Output:
        async with limit:
            return await sequence.complete(params)

    started = time.perf_counter()
    outputs = await asyncio.gather(*(one(sequence) for sequence in sequences))
    seconds = time.perf_counter() - started
    for sequence in sequences:
        sequence.close()
    return seconds, list(outputs)


class Steps:
    """Times the steps of cores in which so many calls decode."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.seconds: list[float] = []
        self._last: tuple[int, bool] = (0, False)
        took, step = Scheduler.took, Core.step

        def noted(scheduler: Scheduler, work: list[Work], seconds: float) -> None:
            self._last = len(work), all(item.drafts or len(item.tokens) == 1 for item in work)
            took(scheduler, work, seconds)

        def timed(core: Core) -> None:
            started = time.perf_counter()
            step(core)
            if self._last == (self.calls, True):
                self.seconds.append(time.perf_counter() - started)

        Scheduler.took, Core.step = noted, timed  # type: ignore[method-assign]
        self.stop = lambda: (setattr(Scheduler, "took", took), setattr(Core, "step", step))


def measure(kind: str, together: int, turns_: int) -> dict[str, Any]:
    pools = PoolSizes(tokens=32768, slots=40, context=4096)
    engines = [Engine.embedded(EngineConfig(limits=CoreLimits(drafts=depth), pools=pools)) for depth in DEPTHS]
    texts = prompts(engines[0], max(2 * together, 24 if kind == "dialogues" else 8))
    seconds: list[list[float]] = [[] for _ in DEPTHS]
    steps: list[list[float]] = [[] for _ in DEPTHS]
    found: list[list[Output]] = [[] for _ in DEPTHS]
    for _ in range(turns_):
        for i, engine in enumerate(engines):
            watch = Steps(together)
            took, found[i] = asyncio.run(run(engine, texts, KINDS[kind], together))
            watch.stop()
            seconds[i].append(took)
            steps[i].append(statistics.mean(watch.seconds))
    for engine in engines:
        engine.close()
    rows = {}
    for depth, own, each, outputs in zip(DEPTHS, seconds, steps, found, strict=True):
        assert [output.tokens for output in outputs] == [output.tokens for output in found[0]]
        total = sum(len(output.tokens) for output in outputs)
        right = sum(output.usage.accepted for output in outputs)
        ratio = statistics.median(s / t for s, t in zip(seconds[0], own, strict=True))
        cost = statistics.median(e / s for e, s in zip(each, steps[0], strict=True))
        per_step = total / (total - right)
        rows[f"{depth} drafts"] = {
            "tokens a second": round(total / statistics.median(own), 1),
            "ratio": round(ratio, 3),
            "drafted": sum(output.usage.drafted for output in outputs),
            "right": right,
            "tokens": total,
            "tokens per step and call": round(per_step, 3),
            "cost of a step": round(cost, 3),
            "ratio to what that can bring": round(ratio * cost / per_step, 3),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--name", default="drafts")
    args = parser.parse_args()
    record(
        args.name,
        {f"{kind}, {n} at a time": measure(kind, n, args.turns) for kind in KINDS for n in (1, 4, 16)},
    )


if __name__ == "__main__":
    main()
