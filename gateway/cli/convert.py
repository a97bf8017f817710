"""`weft convert`: a checkpoint in the other layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from weft.runtime.checkpoint.convert import convert


def run(args: argparse.Namespace) -> int:
    target = Path(args.target)
    convert(args.source, target, args.to, dequantise=args.dequantise, progress=_show_progress)
    print(f"wrote {target}")
    return 0


def _show_progress(done: int, total: int, shard: str) -> None:
    print(f"  {shard}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB", file=sys.stderr)
