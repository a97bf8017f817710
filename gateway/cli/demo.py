"""`weft demo`: write a small checkpoint, load it, run a forking program, and show what that took."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.backend.language import DeepSeekV4Backend
from weft.gateway.cli.run import load_program
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.config import preset
from weft.runtime.engine.front import Engine
from weft.runtime.text.tokenizer import byte_tokenizer_json

# Named, not imported: the library of programs stands above the gateway.
_PROGRAM = "weft.programs.tour:tour"


def run(args: argparse.Namespace) -> int:
    console = Console()
    with _folder(args.keep) as path:
        started = time.perf_counter()
        write_dummy_checkpoint(path, preset("tiny"), args.seed, tokenizer_json=byte_tokenizer_json())
        written = time.perf_counter()
        with Engine.load(path) as engine:
            loaded = time.perf_counter()
            console.print(
                f"preset tiny, random weights (seed {args.seed}): FP8/FP4 checkpoint written in "
                f"{written - started:.1f} s, loaded in {loaded - written:.1f} s, "
                f"{engine.capacity.line()}"
            )
            backend = DeepSeekV4Backend(engine)
            state = load_program(_PROGRAM).run(topic="a loom", backend=backend)
            _show(console, state, time.perf_counter() - loaded)
            error = state.error()
            backend.shutdown()
    if error is not None:
        raise error
    return 0


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep:
        yield Path(keep)
    else:
        with tempfile.TemporaryDirectory(prefix="weft-demo-") as name:
            yield Path(name)


def _show(console: Console, state: Any, seconds: float) -> None:
    console.rule("the program's text (random weights write noise; the network, cache and programs are real)")
    console.print(repr(state.text()), markup=False, highlight=False, soft_wrap=True)
    table = Table("variable", "prompt", "from KV", "computed", "generated", "first token ms", "total ms")
    generated = 0
    for name, meta in state["figures"].items():
        generated += meta["completion_tokens"]
        table.add_row(
            name,
            *(
                str(meta[key])
                for key in ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens")
            ),
            f"{meta['first_token_latency'] * 1e3:.1f}",
            f"{meta['e2e_latency'] * 1e3:.1f}",
        )
    console.print(table)
    console.print(f"{generated} tokens generated in {seconds:.2f} s, all states together")
