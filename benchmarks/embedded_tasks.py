"""Scores of a checkpoint of the embedded model on held-out dialogues, through the engine.

    python benchmarks/embedded_tasks.py [FOLDER] [--master master.pt] [--examples 100]

Per task: turns asked, share right, chance. Retrieval at distances up to 8k tokens. Agent loops with tools really
run. With --master also the trained tensors before they were rounded to FP8 and FP4. How often the MTP block, told
a right answer so far, drafts its next token right. Whether answers are the same one by one, and with the released
rounding of KV rows.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import torch

from support.record import record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.embedded.data import LONG_TASKS, TASKS, TOOL_TASKS, chance
from weft.runtime.embedded.dialogue import Example
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.embedded.encoding import encode
from weft.runtime.embedded.export import read_master
from weft.runtime.embedded.scoring import held_out, score_loops, score_turns
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.model.batch import Batch
from weft.runtime.model.model import Model
from weft.runtime.text.tokenizer import Tokenizer

DISTANCES = (128, 256, 400, 1024, 2048, 4096, 8000)
TOGETHER = 16


def engine_over(model: Model, tokenizer: Tokenizer) -> Engine:
    sizes = PoolSizes(tokens=TOGETHER * 9216, slots=TOGETHER + 4, context=9216, burst=1024)
    return Engine(model, tokenizer, EngineConfig(pools=sizes, limits=CoreLimits(chunk=1024)))


def scores(
    model: Model, tokenizer: Tokenizer, examples: dict[str, list[Example]], together: int
) -> dict[str, Any]:
    """label -> [share right, turns asked, replies]."""
    with engine_over(model, tokenizer) as engine:
        found = {}
        for label, own in examples.items():
            (score,) = asyncio.run(score_turns(engine, own, together=together)).values()
            found[label] = score
        return found


def drafts(model: Model, tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Share of learnt tokens that the MTP block gives from the two tokens' rows before them."""
    right = total = 0
    for example in examples:
        tokens, learn = encode(tokenizer, example)
        pools = Pools(model.config, PoolSizes(tokens=len(tokens), slots=1, context=len(tokens), burst=len(tokens)))
        state = SequenceState(pools)
        state.reserve(len(tokens))
        batch = Batch(pools, [state.span(len(tokens))])
        ids = torch.tensor(tokens)
        streams = model.forward_mtp(model.forward(ids, batch), torch.cat((ids[1:], ids[:1])), batch)
        guess = model.mtp_logits(streams).argmax(1)[:-2]
        said = torch.tensor(learn)[2:]
        right += int((guess == ids[2:])[said].sum())
        total += int(said.sum())
    return right / max(total, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=TOKENIZER.parent)
    parser.add_argument("--master", type=Path)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--name", default="embedded_tasks")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        print(f"{args.folder} has no checkpoint: nothing is scored")
        return
    checkpoint, tokenizer = Checkpoint.open(args.folder), Tokenizer.load(args.folder)
    weights = dict(checkpoint.load(torch.float32))
    shipped = Model(checkpoint.config, weights)
    examples = {task: held_out(task, args.examples) for task in TASKS}
    far = {
        f"{task} at {tokens}": held_out(task, max(args.examples // 2, 1), tokens=tokens)
        for task in LONG_TASKS
        for tokens in (DISTANCES if task == "recall" else (2048, 8000))
    }
    found = scores(shipped, tokenizer, examples | far, TOGETHER)
    variants = {
        "one by one": (shipped, 1),
        "released rounding": (Model(checkpoint.config, weights, quant_sim=True), TOGETHER),
    }
    if args.master:
        variants["before rounding to FP8 and FP4"] = (
            Model(checkpoint.config, read_master(checkpoint.config, args.master)),
            TOGETHER,
        )
    rows: dict[str, dict[str, Any]] = {
        label: {"share": round(score.share, 4), "turns": score.asked, "chance": chance(label.split()[0])}
        for label, score in found.items()
    }
    for name, (model, together) in variants.items():
        for label, score in scores(model, tokenizer, examples, together).items():
            rows[label][name] = round(score.share, 4)
            rows[label][f"{name}, same replies"] = score.replies == found[label].replies
    for task in TASKS:
        rows[task]["drafts"] = round(drafts(shipped, tokenizer, examples[task]), 4)
    with engine_over(shipped, tokenizer) as engine:
        for task in TOOL_TASKS:
            rows[task]["loops"] = round(asyncio.run(score_loops(engine, examples[task])).share, 4)
    record(args.name, rows)


if __name__ == "__main__":
    main()
