"""`weft checkpoint`: random weights in the official layout, for trying things out."""

from __future__ import annotations

import argparse
from pathlib import Path

from weft.gateway.cli.info import config_of
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.text.tokenizer import byte_tokenizer_json


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    write_dummy_checkpoint(path, config_of(args.model), args.seed, tokenizer_json=byte_tokenizer_json())
    print(f"wrote {path}")
    return 0
