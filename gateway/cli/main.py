"""Parse the command line and run one subcommand.

Imports nothing heavy: a subcommand's module loads torch and sglang only when it is chosen, so that `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from importlib import import_module

from weft.runtime.errors import WeftError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft", description="A DeepSeek-V4 runtime for structured programs.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    commands.add_parser("demo", help="run three programs on the embedded model")

    run = commands.add_parser("run", help="run an sglang program: weft run module:program key=value ...")
    run.add_argument("program", help="module:function of an @sgl.function; the current folder is importable")
    run.add_argument("arguments", nargs="*", metavar="key=value", help="JSON where it parses, else text")
    run.add_argument("--thinking", action="store_true", help="assistant turns begin inside <think>")
    run.add_argument("--stream", action="store_true", help="print each variable while it is generated")
    _add_model(run)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("prompt", help="text, which may spell special tokens; - reads standard input")
    generate.add_argument("--stream", action="store_true", help="print the text while it is generated")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    generate.add_argument("--logprobs", type=int, metavar="N", help="list the tokens, with N alternatives each")
    _add_model(generate)
    _add_sampling(generate, max_tokens=128)

    chat = commands.add_parser("chat", help="talk, one line a turn; standard input may be a file")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the first turn")
    chat.add_argument("--thinking", action="store_true", help="reason before answering")
    efforts = ("minimal", "low", "medium", "high", "xhigh", "max")
    chat.add_argument("--effort", choices=efforts, help="how hard to think; default: the checkpoint's own")
    chat.add_argument("--stats", action="store_true", help="after each turn, say what it took")
    _add_model(chat)
    _add_sampling(chat, max_tokens=2048)

    _add_serve(commands.add_parser("serve", help="programs and compatible APIs over HTTP"))
    key = commands.add_parser("key", help="make an API key: prints the line for weft serve --api-keys FILE")
    key.add_argument("name", help="whose it is; also the namespace of its KV")
    key.add_argument("--admin", action="store_true", help="may flush, and end what others run")

    info = commands.add_parser("info", help="sizes of a preset (flash, pro, tiny) or of a checkpoint")
    info.add_argument("model", help="preset, or folder with config.json")

    kernels = commands.add_parser("kernels", help="the device ops, and what runs each of them here")
    architectures = ("cpu", "interpreter", "sm80", "sm89", "sm90", "sm100", "sm120")
    kernels.add_argument("--arch", choices=architectures, help="as it would be there")

    checkpoint = commands.add_parser("checkpoint", help="write an official-layout checkpoint with random weights")
    checkpoint.add_argument("model", help="preset, or folder with config.json")
    checkpoint.add_argument("path", metavar="DIR")
    checkpoint.add_argument("--seed", type=int, default=0)

    convert = commands.add_parser("convert", help="write a checkpoint in the other layout")
    convert.add_argument("source", metavar="DIR")
    convert.add_argument("target", metavar="NEW_DIR")
    convert.add_argument("--to", choices=("official", "huggingface"), required=True)
    convert.add_argument("--dequantise", action="store_true", help="plain bf16 files (huggingface only)")

    for command in commands.choices.values():
        # Absent, it must not undo one that stands before the subcommand.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse takes the arguments of `run` from one place only; they may stand on both sides of its options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "run" and not any(text.startswith("-") for text in rest):
        args.arguments += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _add_model(parser: argparse.ArgumentParser) -> None:
    about = "checkpoint: config, weights, tokenizer.json; default: the model that comes with weft"
    parser.add_argument("--model", default="embedded", metavar="DIR", help=about)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one NVIDIA GPU, with Triton"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quant-sim", action="store_true", help="round KV as the released model does")


def _add_serve(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="default %(default)s; one that others can reach needs --api-keys")
    add("--port", type=int, default=30000, help="default %(default)s; 0 takes a free one")
    add(
        "--programs",
        action="extend",
        nargs="+",
        default=[],
        metavar="MODULE[:NAME][@TAG]",
        help="programs and tools to serve",
    )
    add("--api-keys", metavar="FILE", help="lines that `weft key` prints")
    add("--name", action="append", metavar="NAME", help="what clients call the model; * for anything")
    add("--thinking", action="store_true", help="turns think unless a request says otherwise")
    add("--queue", type=int, default=1024, metavar="N", help="requests under way at most, waiting ones included")
    add("--share", type=float, default=1.0, metavar="F", help="of the queue, for one key at most; default all")
    add("--drain", type=float, default=30.0, metavar="S", help="seconds for what is under way at the end")
    add("--keepalive", type=float, default=10.0, metavar="S", help="of silence in a stream before a comment")
    add("--slots", type=int, metavar="N", help="sequences with KV at one time")
    add("--kv-tokens", type=int, metavar="N", help="tokens of history over all sequences")
    add("--context", type=int, metavar="N", help="tokens of the longest history")
    add("--drafts", type=int, default=1, metavar="N", help="tokens the MTP block may guess per step, 0 to 7")
    add("--threads", type=int, metavar="N", help="of the engine's process")
    _add_model(serve)


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors print one line unless --debug is given."""
    args = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            if not args.debug:
                # sglang's worker prints the traceback of an error that `weft run` reports itself.
                warnings.filterwarnings("ignore", message="Error in stream_executor")
            status: int = import_module(f"weft.gateway.cli.{args.command}").run(args)
            return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, WeftError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        print("weft:", " ".join(text.split()), file=sys.stderr)
        return 2
