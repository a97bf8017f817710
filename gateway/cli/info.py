"""`weft info`: what a model is, from its config alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from weft.runtime.config import PRESETS, ModelConfig, preset
from weft.runtime.sizes import report


def run(args: argparse.Namespace) -> int:
    config = config_of(args.model)
    rows = report(config)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if config.unknown_keys:
        print(f"{'ignored keys':<{width}}  {', '.join(config.unknown_keys)}")
    return 0


def config_of(model: str) -> ModelConfig:
    """A preset's name, or a folder with a config.json."""
    if model in PRESETS or not Path(model).exists():
        return preset(model)
    return ModelConfig.load(Path(model))
