"""Write trained tensors as a checkpoint: `python -m weft.runtime.embedded.export MASTER FOLDER`.

MASTER is the `master.pt` of a training. FOLDER gets the official layout: FP8 linears, FP4 experts, tokenizer.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from weft.runtime.checkpoint.writer import write_official
from weft.runtime.config import ModelConfig
from weft.runtime.embedded.documents import TOKENIZER
from weft.runtime.embedded.params import unstack
from weft.runtime.embedded.recipe import RECIPES


def read_master(config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """The trained tensors under their official names, float32."""
    params: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return unstack(config, params)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write trained tensors as a checkpoint.")
    parser.add_argument("master", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="gpu", help="the one it was trained by")
    args = parser.parse_args(arguments)
    config = RECIPES[args.recipe].config
    tokenizer = TOKENIZER.read_text(encoding="utf-8")
    write_official(args.folder, config, read_master(config, args.master), tokenizer_json=tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
