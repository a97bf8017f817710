"""Weft's engine beside transformers' DeepseekV4ForCausalLM: same weights, same machine, same run, on CPU.

Each case measures both in turn, several times, and reports the median of each and their ratio. Thread counts and
models run in processes of their own; so do the peaks of memory.

    python benchmarks/cpu_vs_transformers.py [--models tiny wide] [--threads 1 2] [--repeats 3]

Decode figures leave the prefill out; a ratio is the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from support.record import peak_rss_gib, record
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.checkpoint.hf_names import to_hf_state_dict
from weft.runtime.config import ModelConfig, preset
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.model.model import Model
from weft.runtime.text.tokenizer import byte_tokenizer

Runner = Callable[[list[list[int]], int], None]

NEW_TOKENS = 64
CONTEXT = 256
STREAMS = 16
MIXED = [32 + 31 * i for i in range(STREAMS)]  # 32..497 tokens


def config_of(name: str) -> ModelConfig:
    if name == "tiny":
        return preset("tiny")
    return dataclasses.replace(  # ten times the parameters of tiny
        preset("tiny"),
        hidden_size=384,
        num_attention_heads=8,
        head_dim=96,
        q_lora_rank=128,
        o_lora_rank=64,
        n_routed_experts=16,
        moe_intermediate_size=160,
    )


def prompt(config: ModelConfig, length: int, seed: int) -> list[int]:
    """Tokens the byte tokenizer defines, EOS left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


class Theirs:
    """transformers, greedy, with its cache."""

    def __init__(self, config: ModelConfig) -> None:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        logging.getLogger("transformers").setLevel(logging.ERROR)
        theirs = DeepseekV4Config(**config.to_dict(), attn_implementation="eager")
        theirs.quantization_config = None
        self.model = DeepseekV4ForCausalLM(theirs).eval()
        self.model.load_state_dict(to_hf_state_dict(config, dummy_weights(config, 0)), strict=True)
        self.model.float()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=2,
        )
        assert out.shape[1] == ids.shape[1] + tokens

    def one_by_one(self, prompts: list[list[int]], tokens: int) -> None:
        for own in prompts:
            self.generate([own], tokens)


class Ours:
    """The engine, all requests at once."""

    def __init__(self, config: ModelConfig, deterministic: bool) -> None:
        model = Model(config, dummy_weights(config, 0), deterministic=deterministic)
        sizes = PoolSizes(tokens=STREAMS * 1024 + 16384, slots=STREAMS + 4, context=16384, burst=1024)
        self.engine = Engine(model, byte_tokenizer(), EngineConfig(pools=sizes, limits=CoreLimits(chunk=1024)))

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)

        async def run() -> None:
            outputs = await asyncio.gather(*(self.engine.generate(own, params) for own in prompts))
            assert all(len(output.tokens) == tokens for output in outputs)

        asyncio.run(run())


def cases(config: ModelConfig, long: list[int]) -> dict[str, tuple[list[list[int]], int, bool]]:
    """name -> prompts, new tokens, whether transformers runs them one by one."""
    table = {
        "decode, 1 stream": ([prompt(config, CONTEXT, 0)], NEW_TOKENS, False),
        "decode, 16 equal streams": ([prompt(config, CONTEXT, i) for i in range(STREAMS)], NEW_TOKENS, False),
        "decode, 16 mixed streams": ([prompt(config, n, n) for n in MIXED], NEW_TOKENS, True),
    }
    for length in long:
        table[f"prefill {length}"] = ([prompt(config, length, 1)], 1, False)
    return table


def measure(name: str, repeats: int, long: list[int]) -> list[dict[str, Any]]:
    config = config_of(name)
    theirs, exact, fast = Theirs(config), Ours(config, True), Ours(config, False)
    rows = []
    for case, (prompts, tokens, alone) in cases(config, long).items():
        runners: dict[str, Runner] = {
            "transformers": theirs.one_by_one if alone else theirs.generate,
            "weft": exact.generate,
            "weft fast": fast.generate,
        }
        times: dict[str, list[float]] = {label: [] for label in runners}
        for turn in range(repeats + 1):
            for label, run in runners.items():
                taken = decode_seconds(run, prompts, tokens) if tokens > 1 else seconds(run, prompts, 1)
                if turn or tokens == 1:  # the first turn of a decode warms up
                    times[label].append(taken)
            if tokens == 1 and turn + 1 == repeats:
                break
        rows.append(row_of(case, times, tokens * len(prompts) if tokens > 1 else len(prompts[0])))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def seconds(run: Runner, prompts: list[list[int]], tokens: int) -> float:
    started = time.perf_counter()
    run(prompts, tokens)
    return time.perf_counter() - started


def decode_seconds(run: Runner, prompts: list[list[int]], tokens: int) -> float:
    """Without the prefill: what `tokens` more than one take."""
    return seconds(run, prompts, tokens + 1) - seconds(run, prompts, 1)


def row_of(case: str, times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    median = {label: statistics.median(own) for label, own in times.items()}
    row: dict[str, Any] = {"case": case}
    for label, own in median.items():
        row[f"{label} s"] = round(own, 3)
        row[f"{label} tok/s"] = round(tokens / own, 1)
    for label in ("weft", "weft fast"):
        pairs = [a / b for a, b in zip(times["transformers"], times[label], strict=True)]
        row[f"ratio {label}"] = round(statistics.median(pairs), 2)
    return row


def peak(name: str, side: str, length: int) -> float:
    """GiB of a process that loads one side and prefills `length` tokens, and decodes 16 more."""
    config = config_of(name)
    runner = Theirs(config) if side == "transformers" else Ours(config, True)
    runner.generate([prompt(config, length, 1)], 16)
    return peak_rss_gib()


def child(arguments: list[str], threads: int) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *arguments]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tiny", "wide"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", nargs="*", type=int, default=[4096, 8192])
    parser.add_argument("--name", default="cpu_vs_transformers")
    parser.add_argument("--child", choices=("measure", "peak"))
    parser.add_argument("--side", default="")
    args = parser.parse_args()
    long = [str(n) for n in args.long]
    if args.child == "measure":
        print(json.dumps(measure(args.models[0], args.repeats, args.long)))
        return
    if args.child == "peak":
        print(json.dumps(peak(args.models[0], args.side, args.long[0])))
        return
    figures: dict[str, Any] = {}
    for name in args.models:
        for threads in args.threads:
            arguments = ["--child", "measure", "--models", name, "--repeats", str(args.repeats), "--long", *long]
            figures[f"{name}, {threads} threads"] = child(arguments, threads)
        figures[f"{name}, peak GiB"] = {
            side: round(child(["--child", "peak", "--models", name, "--side", side, "--long", long[0]], 1), 3)
            for side in ("transformers", "weft")
            if long
        }
    record(args.name, figures)


if __name__ == "__main__":
    main()
