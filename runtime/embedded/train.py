"""Train the embedded model: `python -m weft.runtime.embedded.train FOLDER`, on a GPU if there is one.

FOLDER gets `state.pt` (everything, to go on from), `log.jsonl` and, at the end, `master.pt` (the trained tensors).
The same command goes on where it stopped; `--piece` stops it in good time, with status 75 if it has to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from weft.runtime.embedded.data import TASKS
from weft.runtime.embedded.documents import documents
from weft.runtime.embedded.layers import Mode
from weft.runtime.embedded.losses import losses, tally
from weft.runtime.embedded.network import Network, Output
from weft.runtime.embedded.optimizer import Optimizer
from weft.runtime.embedded.params import as_shipped, initial, trained_weights
from weft.runtime.embedded.recipe import RECIPES, Recipe, Stage
from weft.runtime.embedded.rows import Feed, Rows, as_rows, pack

UNFINISHED = 75  # EX_TEMPFAIL
_BALANCE = 1e-3  # how fast the gates' bias evens out the experts' load
_LONG = 4096  # rows beyond it compute their attention twice, or it would not fit


class Trainer:
    """The parameters, their optimiser and how far they are. Writes to `folder` only."""

    def __init__(self, recipe: Recipe, folder: Path, workers: int, start: Path | None = None) -> None:
        """start: the `master.pt` of an earlier training, to go on from; not read again once there is a state."""
        self.recipe, self.folder, self.workers = recipe, folder, workers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        config = recipe.config
        self.params = {name: value.to(self.device) for name, value in initial(config, recipe.seed).items()}
        self.gated = [name for name in self.params if name.endswith("gate.bias")]
        for name, kind in trained_weights(config).items():
            self.params[name].requires_grad_(kind.role not in ("bias", "expert_table"))
        self.optimizer = Optimizer(config, self.params, recipe.rates)
        self.network = Network.build(config, _compiled) if on_gpu else Network.build(config)
        self.step = 0
        self.seconds = 0.0
        state = folder / "state.pt"
        if state.exists():
            self._load(torch.load(state, map_location=self.device, weights_only=True))
        elif start is not None:
            self._take(torch.load(start, map_location=self.device, weights_only=True))

    @property
    def progress(self) -> float:
        return self.recipe.progress(self.step, self.seconds)

    def run(self, piece: float, log_every: int, check_every: int) -> bool:
        """Train to the end, or for `piece` seconds; True at the end."""
        last = time.monotonic() + piece
        while self.progress < 1:
            number = self.recipe.stage(self.progress)
            self._stage(number, last, log_every, check_every)
            self.note({"stage": number, "held out": self.check(self.recipe.stages[number])})
            self.save()
            if time.monotonic() > last:
                return False
        torch.save({n: p.detach().cpu() for n, p in self.params.items()}, self.folder / "master.pt")
        return True

    def _stage(self, number: int, last: float, log_every: int, check_every: int) -> None:
        """Until the stage or the piece is over."""
        stage = self.recipe.stages[number]
        seed = zlib.crc32(f"{self.recipe.seed} {number} {self.step}".encode())
        source = documents("train", seed, stage.longest, stage.long, stage.tasks)
        feed = Feed(source, rows=stage.rows, length=stage.length, workers=self.workers)
        clock, seen = time.monotonic(), 0
        try:
            for rows in feed:
                report = self.update(rows.to(self.device), stage)
                seen += rows.ids.numel()
                now = time.monotonic()
                self.step, self.seconds, clock = self.step + 1, self.seconds + now - clock, now
                if self.step % log_every == 0:
                    figures = {name: round(value.item(), 4) for name, value in report.items()}
                    self.note({"stage": number, "seconds": round(self.seconds, 1), "tokens": seen, **figures})
                if self.step % check_every == 0:
                    self.note({"held out": self.check(stage)})
                    self.save()
                if self.progress == 1 or self.recipe.stage(self.progress) != number or now > last:
                    return
        finally:
            feed.close()

    def update(self, rows: Rows, stage: Stage) -> dict[str, Tensor]:
        recipe = self.recipe
        out, head = self.forward(rows, stage)
        said, other, draft, _ = losses(out.hidden, out.draft, head, rows)
        loss = said + recipe.other * other + recipe.draft * draft + recipe.index * out.index_loss
        loss.backward()
        self.optimizer.step(recipe.scale(self.step, self.progress))
        with torch.no_grad():
            for name, load in zip(self.gated, out.load, strict=True):
                self.params[name].add_(torch.sign(load.mean() - load), alpha=_BALANCE)
        top = out.load.amax(1).mean() / out.load.mean()
        return {"said": said, "other": other, "draft": draft, "index": out.index_loss, "load": top}

    def forward(self, rows: Rows, stage: Stage) -> tuple[Output, Tensor]:
        mode = Mode(self.dtype, stage.sparse, rounding=True, recompute=stage.length > _LONG)
        params = as_shipped(self.recipe.config, self.params) if stage.shipped else self.params
        return self.network(params, rows.ids, rows.positions, mode), params["head.weight"]

    def check(self, stage: Stage, batches: int = 2) -> dict[str, list[float]]:
        """Per task: the share of held-out dialogues of which every learnt token is the likeliest one, the share of
        learnt tokens that the MTP block would draft right, and the number of dialogues."""
        packed = pack(documents("heldout", 0, stage.longest, stage.long)(0, 1), stage.length)
        right = torch.zeros(len(TASKS), 4)
        for _ in range(batches):
            rows = as_rows([next(packed) for _ in range(stage.rows)]).to(self.device)
            out, head = self.forward(rows, stage)
            hits, drafted = (x.detach() for x in losses(out.hidden, out.draft, head, rows)[3])
            right += tally(rows, hits, drafted)
        return {
            name: [round(whole / max(count, 1), 3), round(token / max(tokens, 1), 3), int(count)]
            for name, (whole, count, token, tokens) in zip(TASKS, right.tolist(), strict=True)
        }

    def note(self, what: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step, **what})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        own = {"step": self.step, "seconds": self.seconds}
        part = self.folder / "state.part"
        torch.save({**own, "params": self.params, "optimizer": self.optimizer.state()}, part)
        part.replace(self.folder / "state.pt")

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self._take(state["params"])
        self.optimizer.load(state["optimizer"])

    @torch.no_grad()
    def _take(self, params: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.copy_(params[name])


def _compiled(function: Any) -> Any:
    torch._dynamo.config.cache_size_limit = 64
    # It gives wrong gradients of tensors that are used in slices, as scales and bases here (pytorch issue 193061).
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        torch._inductor.config.triton.mix_order_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch.compile(function, dynamic=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the embedded model; the same command goes on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="gpu")
    parser.add_argument("--minutes", type=float, help="of the whole training; default: the recipe's")
    parser.add_argument("--start", type=Path, help="master.pt of a training to go on from")
    parser.add_argument("--piece", type=float, default=1e9, help="minutes after which to stop for now")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--check-every", type=int, default=200)
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.recipe]
    if args.minutes is not None:
        recipe = dataclasses.replace(recipe, minutes=args.minutes)
    args.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, args.folder, args.workers, args.start)
    return 0 if trainer.run(60 * args.piece, args.log_every, args.check_every) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
