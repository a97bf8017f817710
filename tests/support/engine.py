"""A model small enough for hundreds of steps, engines on it, and waits that fail instead of hanging.

Every engine made by `running` is checked for leaks when its test has ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import pytest
import tokenizers
import torch
from torch import Tensor

from support.run import run
from weft.runtime.cache.capacity import KINDS, IndexFormat, KvFormat, PageKind, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.prefix import PrefixCache
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.config import ModelConfig, preset
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import Draw, sample
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.core import Core
from weft.runtime.engine.front import Engine
from weft.runtime.engine.link import ThreadLink
from weft.runtime.engine.pace import Drafting
from weft.runtime.model.base import Network
from weft.runtime.model.batch import Batch
from weft.runtime.model.model import Model
from weft.runtime.text.tokenizer import Tokenizer, byte_tokenizer_json

T = TypeVar("T")

# After which a wait has failed; on a GPU kernels are compiled in it.
SECONDS = 300.0 if torch.cuda.is_available() else 30.0
VOCABULARY = 272  # the byte tokenizer defines 265 of them
EOS = 1
UNPAGED = 1024  # a page that holds all of a sequence


def small_config(*ratios: int, mtp: bool = True) -> ModelConfig:
    """Layers of these ratios, a window of 16, and 4 entries picked by the indexer."""
    return dataclasses.replace(
        preset("tiny"),
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, 0),
        num_attention_heads=2,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=1,
        sliding_window=16,
        index_head_dim=16,
        index_topk=4,
        n_routed_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_hash_layers=1,
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=int(mtp),
    )


@cache
def small_model(*ratios: int, mtp: bool = True) -> Model:
    """Random weights; c4a then c128a unless told. Ids the tokenizer lacks get logits that would win often."""
    config = small_config(*(ratios or (4, 128)), mtp=mtp)
    weights = dummy_weights(config, seed=1)
    weights["head.weight"][byte_tokenizer().size :] *= 3
    return Model(config, weights)


@cache
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer_json()))


def some_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, byte_tokenizer().size, (count,), generator=generator).tolist()


# -- what an output has to be ------------------------------------------------------------------------


def drawn_again(prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> list[int]:
    """The tokens that sampling picks from the logits of one cold, unpaged run, given those before them."""
    logits = run(small_model(), [*prompt, *output[:-1]], page=UNPAGED)[len(prompt) - 1 :]
    counts: dict[int, int] = {}
    draws = []
    for i, token in enumerate(output):
        blocked = list(range(byte_tokenizer().size, VOCABULARY))
        if i < params.min_tokens:
            blocked += [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
        history = [*prompt, *output[:i]]
        draws.append(Draw(params, params.seed or 0, len(history), blocked, dict(counts), history))
        counts[token] = counts.get(token, 0) + 1
    return sample(logits, draws)


FOUR = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)


async def verified(engine: Engine, prompt: list[int], params: SamplingParams = FOUR, **options: Any) -> m.Usage:
    """Usage of one generation, which draws what a cold run alone would."""
    with engine.open(prompt, **options) as sequence:
        output = await sequence.complete(params)
    assert output.tokens == drawn_again(prompt, output.tokens, params)
    return output.usage


# -- engines -----------------------------------------------------------------------------------------


class Gate:
    """A model whose steps wait while the gate is shut; it also notes the tokens of each step.

    fault: raised by the next step, once.
    """

    def __init__(self, model: Network | None = None) -> None:
        self._model = model or small_model()
        self.config, self.dtype = self._model.config, self._model.dtype
        self.steps: list[int] = []
        self.fault: BaseException | None = None
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        self.steps.append(len(ids))
        assert self._open.wait(SECONDS), "the gate was left shut"
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return self._model.forward(ids, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights draft badly; go on all the same, and as far as may be."""
    monkeypatch.setattr(Drafting, "cost", lambda self, calls: -1.0)


@contextmanager
def running(
    model: Network | Gate | None = None,
    *,
    chunk: int = 64,
    queue: int = 64,
    restarts: int = 0,
    drafts: int = 0,
    leaks: bool = False,
    formats: tuple[KvFormat | None, IndexFormat | None] = (None, None),
    **pools: int,
) -> Iterator[Engine]:
    """An engine, closed at the end, after everything is free again (unless `leaks`). formats: of KV rows and index
    keys."""
    sizes = PoolSizes(**({"tokens": 8192, "slots": 40, "context": 1024, "burst": 512, "page": 16} | pools))
    limits = CoreLimits(chunk, drafts, queue, restarts)
    config = EngineConfig(pools=sizes, limits=limits, kv_format=formats[0], index_format=formats[1])
    engine = Engine(model or small_model(), byte_tokenizer(), config)  # type: ignore[arg-type]
    try:
        yield engine
        if not leaks:
            wait_for(lambda: is_empty(engine), seconds=10)
            core_of(engine).pools.check()
    finally:
        stop(engine)


def stop(engine: Engine) -> None:
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(SECONDS)
    assert not closing.is_alive(), "close hangs"


def link_of(engine: Engine) -> ThreadLink:
    assert isinstance(engine._link, ThreadLink)
    return engine._link


def core_of(engine: Engine) -> Core:
    """Owned by another thread: for looking at only. While it is replaced there is none."""
    return link_of(engine).core


def is_idle(engine: Engine) -> bool:
    """No call, no sequence, and no message that could make one."""
    if not hasattr(link_of(engine), "core"):
        return False
    core = core_of(engine)
    return not core.calls and not core.sequences and link_of(engine).inbox.empty() and not engine._calls


def is_empty(engine: Engine) -> bool:
    """Idle, and what is still held is the prefix cache's."""
    return is_idle(engine) and free(core_of(engine).pools, core_of(engine).memory.prefix)


def kept(prefix: PrefixCache) -> dict[PageKind, Counter[int]]:
    """How often the prefix cache holds each page; verifies its invariants."""
    prefix.check()
    held: dict[PageKind, Counter[int]] = {kind: Counter() for kind in KINDS}
    for (kind, page), count in prefix.tree.check().items():
        held[kind][page] += count
    for checkpoint in prefix.checkpoints.held:
        held["window"].update(checkpoint.window.values())
    return held


def free(pools: Pools, prefix: PrefixCache | None = None) -> bool:
    """No slot is held, and no page but by the prefix cache."""
    held = kept(prefix) if prefix is not None else {}
    pages = all(
        allocator.free == allocator.total - len(held.get(kind, ())) for kind, allocator in pools.allocators.items()
    )
    tables = all(int(table.count_nonzero()) == 0 for table in pools.tables.values())
    return pages and tables and pools.free_slots == pools.sizes.slots


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Until another thread has made it true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


async def until(condition: Callable[[], bool]) -> None:
    """`wait_for` on an event loop."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop of its own; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(work, SECONDS))
