"""Parse the command line and run one subcommand.

Imports nothing heavy: a subcommand's module loads torch and sglang only when it is chosen, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from weft.runtime.errors import WeftError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft", description="A DeepSeek-V4 runtime for structured programs.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="run a forking multi-turn program on a small random-weight model")
    demo.add_argument("--seed", type=int, default=0, help="seed of the weights")
    demo.add_argument("--keep", metavar="DIR", help="write the checkpoint here and keep it")

    run = commands.add_parser("run", help="run an sglang program: weft run module:program key=value ...")
    run.add_argument("program", help="module:function of an @sgl.function; the current folder is importable")
    run.add_argument("arguments", nargs="*", metavar="key=value", help="JSON where it parses, else text")
    run.add_argument("--model", required=True, metavar="DIR", help="checkpoint: config, weights, tokenizer.json")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    run.add_argument("--quant-sim", action="store_true", help="round KV as the released model does")
    run.add_argument("--thinking", action="store_true", help="assistant turns begin inside <think>")

    info = commands.add_parser("info", help="sizes of a preset (flash, pro, tiny) or of a checkpoint")
    info.add_argument("model", help="preset, or folder with config.json")

    checkpoint = commands.add_parser("checkpoint", help="write an official-layout checkpoint with random weights")
    checkpoint.add_argument("model", help="preset, or folder with config.json")
    checkpoint.add_argument("path", metavar="DIR")
    checkpoint.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors print one line unless --debug is given."""
    args = _parser().parse_args(argv)
    try:
        status: int = import_module(f"weft.gateway.cli.{args.command}").run(args)
        return status
    except WeftError as error:
        if args.debug:
            raise
        print(f"weft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
