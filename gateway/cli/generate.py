"""`weft generate`: the continuation of a text. Also what every command with a model needs."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import EMBEDDED, Engine
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args, stop=tuple(args.stop), logprobs=args.logprobs)
    prompt = utf8("prompt", sys.stdin.read() if args.prompt == "-" else args.prompt)
    with load_engine(args) as engine:
        tokens = engine.tokenizer.encode(prompt)
        if tokens[:1] != [engine.tokenizer.bos]:
            tokens.insert(0, engine.tokenizer.bos)
        found = asyncio.run(_continue(engine, tokens, params, args.stream))
        for result in found:
            print(_row(result, engine.tokenizer))
    return 0


async def _continue(engine: Engine, prompt: list[int], params: SamplingParams, stream: bool) -> list[m.Logprob]:
    """Print what follows the prompt; returns the log-probabilities that were asked for."""
    pieces: list[str] = []
    found: list[m.Logprob] = []
    with engine.open(prompt) as sequence:
        async for event in sequence.generate(params):
            if isinstance(event, m.Delta):
                found += event.logprobs
                if stream:
                    show(event.text)
                else:
                    pieces.append(event.text)
    show("".join(pieces) + "\n")
    return found


def _row(result: m.Logprob, tokenizer: Tokenizer) -> str:
    """Log-probability, id and text of one token, then of its alternatives."""
    entries = [(result.token, result.logprob), *result.top]
    return "  ".join(f"{logprob:9.4f} {token:>6} {tokenizer.decode([token])!r}" for token, logprob in entries)


# -- shared with the other commands ------------------------------------------------------------------------


def load_engine(args: argparse.Namespace) -> Engine:
    config = EngineConfig(device=args.device, dtype=args.dtype, quant_sim=args.quant_sim)
    path = EMBEDDED if args.model == "embedded" else Path(args.model)
    engine = Engine.load(path, config, _show_progress)
    print(engine.capacity.line(), file=sys.stderr)
    return engine


def sampling_params(
    args: argparse.Namespace, stop: tuple[str, ...] = (), logprobs: int | None = None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=stop,
        logprobs=logprobs,
    ).validate()


def show(text: str) -> None:
    """Print at once what a model wrote. A terminal must not obey it, so there control characters are pictures."""
    sys.stdout.write(text.translate(_PICTURES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def utf8(field: str, text: str) -> str:
    """The text, if it can be tokenised: bytes that are not UTF-8 reach Python as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, text[:80], f"not UTF-8: {error.reason} at {error.start}") from None
    return text


def _show_progress(done: int, total: int, shard: str) -> None:
    print(f"  {shard}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB", file=sys.stderr)
