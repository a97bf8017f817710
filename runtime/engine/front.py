"""`Engine` and `Sequence`: the boundary that backend and gateway see. Tokens and text in and out, no tensors.

The core runs in a thread of its own. Methods are coroutines of whatever event loop calls them; several loops
may share one engine.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import random
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import torch

from weft.runtime import errors
from weft.runtime.cache.pools import Pools, PoolSizes
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.config import ModelConfig
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.core import Core, CoreLimits
from weft.runtime.model.model import Model
from weft.runtime.model.weights import Draining
from weft.runtime.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. dtype: float32 or bfloat16. quant_sim: round KV as the released model does.

    deterministic: results do not depend on batch, chunks or forks, to the bit; False trades that for speed.

    pools: KV memory; its `burst` is raised to the prefill chunk if that is larger.
    """

    dtype: str = "float32"
    quant_sim: bool = False
    deterministic: bool = True
    pools: PoolSizes = field(default_factory=PoolSizes)
    limits: CoreLimits = field(default_factory=CoreLimits)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise errors.ConfigError("dtype", self.dtype, "must be float32 or bfloat16")
        if self.pools.burst < self.limits.chunk:
            raise errors.ConfigError("pools.burst", self.pools.burst, f"below limits.chunk {self.limits.chunk}")


@dataclass(frozen=True)
class Output:
    """A finished generation. tokens: all drawn, the stop included; text: without it.
    kept: how many of the tokens lie wholly in the text."""

    tokens: list[int]
    text: str
    logprobs: list[m.Logprob]
    finish_reason: str
    stop: str | int | None
    kept: int
    usage: m.Usage


class Engine:
    """A loaded model. Close it, or use it as a context manager."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.model_config: ModelConfig = model.config
        self.tokenizer = tokenizer
        self.pools_nbytes = 0
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[m.Request] = queue.SimpleQueue()
        self._calls: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[m.Event]]] = {}
        self._lock = threading.Lock()
        self._death: BaseException | None = None
        self._closed = False
        pools = Pools(model.config, config.pools, model.dtype)
        self.pools_nbytes = pools.nbytes
        self.context = config.pools.context
        self.slots = config.pools.slots
        self._core = Core(model, pools, tokenizer, config.limits, self._deliver)
        self._thread = threading.Thread(target=self._run, name="weft-core", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, path: Path | str, config: EngineConfig | None = None, progress: Progress | None = None
    ) -> Engine:
        """Load a checkpoint directory: weights in either layout, config.json and tokenizer.json."""
        config = config or EngineConfig()
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        checkpoint = Checkpoint.open(Path(path))
        tokenizer = Tokenizer.load(Path(path))
        weights = Draining(dict(checkpoint.load(dtype, progress)))
        model = Model(
            checkpoint.config, weights, dtype=dtype, quant_sim=config.quant_sim, deterministic=config.deterministic
        )
        return cls(model, tokenizer, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the core; calls still waiting end with `Cancelled`. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._inbox.put(m.Stop())
            self._thread.join()

    # -- sequences --------------------------------------------------------------------------------------

    def open(self, content: str | Seq[int]) -> Sequence:
        """A sequence with this history. Text is encoded as it stands: no BOS is added."""
        sequence = Sequence(self, next(self._ids))
        self._send(m.Open(sequence.id, self._tokens(content)))
        return sequence

    async def generate(self, prompt: str | Seq[int], params: SamplingParams) -> Output:
        """One-shot: open, generate, close."""
        with self.open(prompt) as sequence:
            return await sequence.complete(params)

    # -- plumbing ---------------------------------------------------------------------------------------

    def _tokens(self, content: str | Seq[int]) -> list[int]:
        if isinstance(content, str):
            return self.tokenizer.encode(content)
        vocabulary = self.model_config.vocab_size
        for token in content:
            if not 0 <= token < vocabulary:
                raise errors.RequestError("tokens", token, f"not in a vocabulary of {vocabulary}")
        return list(content)

    def _send(self, message: m.Request) -> None:
        if self._closed:
            raise errors.EngineDead("the engine is closed")
        if self._death is not None:
            raise errors.EngineDead("the engine core has stopped") from self._death
        self._inbox.put(message)

    async def _call(self, make: Callable[[int], m.Request]) -> AsyncIterator[m.Delta | m.Done]:
        """Send a call and yield its events up to Done; leaving early cancels it."""
        number = next(self._ids)
        events: asyncio.Queue[m.Event] = asyncio.Queue()
        with self._lock:
            self._calls[number] = (asyncio.get_running_loop(), events)
        finished = False
        try:
            self._send(make(number))
            while not finished:
                event = await events.get()
                finished = not isinstance(event, m.Delta)
                if isinstance(event, m.Failed):
                    raise _exception(event, self._death)
                yield event
        finally:
            with self._lock:
                self._calls.pop(number, None)
            if not finished and self._death is None and not self._closed:
                self._inbox.put(m.Cancel(number))

    async def _result(self, make: Callable[[int], m.Request]) -> m.Done:
        async for event in self._call(make):
            if isinstance(event, m.Done):
                return event
        raise AssertionError("a call ends with Done or an exception")

    def _deliver(self, event: m.Event) -> None:
        """Hand an event to the loop that waits for it. Runs in the core's thread."""
        with self._lock:
            waiting = self._calls.get(event.call)
        if waiting is None:
            return  # the caller has left; its Cancel is on the way
        loop, events = waiting
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            # The loop was closed with the call still open: nobody can receive the event any more.
            self._inbox.put(m.Cancel(event.call))

    def _run(self) -> None:
        """The core's thread: messages first, then a step, for ever."""
        core = self._core
        try:
            while True:
                block = not core.has_work()
                while block or not self._inbox.empty():
                    message = self._inbox.get()
                    core.handle(message)
                    if isinstance(message, m.Stop):
                        return
                    block = False
                if core.has_work():
                    core.step()
        except BaseException as error:
            self._death = error
            with self._lock:
                waiting = list(self._calls)
            for call in waiting:
                self._deliver(m.Failed(call, "EngineDead", f"the engine core stopped: {error!r}"))
            if not isinstance(error, Exception):
                raise


class Sequence:
    """One history in an engine. Calls on it run in the order they are made.

    Owned by whoever opened or forked it; `close` frees its KV (forks keep what they share). Usable as a context
    manager.
    """

    def __init__(self, engine: Engine, id: int) -> None:
        self.engine = engine
        self.id = id
        # What the fork that made this sequence took: how much of the history was cached, how much computed.
        self.origin = m.Usage()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extend(self, content: str | Seq[int]) -> None:
        """Append tokens, or text as the tokenizer splits it alone."""
        self._send(m.Extend(self.id, self.engine._tokens(content)))

    async def generate(self, params: SamplingParams) -> AsyncIterator[m.Delta | m.Done]:
        """Deltas as tokens are drawn, then Done. The drawn tokens join the history."""
        params = params.validate()
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=random.getrandbits(63))
        self._check_open()
        async for event in self.engine._call(lambda call: m.Generate(call, self.id, params)):
            yield event

    async def complete(self, params: SamplingParams) -> Output:
        """`generate`, gathered."""
        tokens: list[int] = []
        text: list[str] = []
        logprobs: list[m.Logprob] = []
        async for event in self.generate(params):
            if isinstance(event, m.Delta):
                tokens += event.tokens
                text.append(event.text)
                logprobs += event.logprobs
            else:
                return Output(
                    tokens, "".join(text), logprobs, event.finish_reason, event.stop, event.kept, event.usage
                )
        raise AssertionError("a generation ends with Done or an exception")

    async def fork(self, count: int = 1) -> list[Sequence]:
        """`count` sequences with this history, which is computed once and shared."""
        if count < 1:
            raise errors.RequestError("count", count, "must be at least 1")
        self._check_open()
        children = [Sequence(self.engine, next(self.engine._ids)) for _ in range(count)]
        try:
            done = await self.engine._result(lambda call: m.Fork(call, self.id, [child.id for child in children]))
        except BaseException:
            for child in children:  # a cancelled fork may have made them already
                child.close()
            raise
        for child in children:
            child.origin = done.usage
        return children

    async def append_scored(self, tokens: Seq[int], top: int = 0) -> list[m.Logprob]:
        """Append tokens; the log-probability of each (of all but the first, if the history was empty)."""
        self._check_open()
        ids = self.engine._tokens(tokens)
        return (await self.engine._result(lambda call: m.Score(call, self.id, ids, top))).logprobs

    async def score(self, continuations: Seq[Seq[int]], top: int = 0) -> list[list[m.Logprob]]:
        """Log-probabilities of the tokens of each continuation of this history, which stays as it is."""
        children = await self.fork(len(continuations))
        try:
            scored = [child.append_scored(c, top) for child, c in zip(children, continuations, strict=True)]
            return list(await asyncio.gather(*scored))
        finally:
            for child in children:
                child.close()

    async def truncate(self, length: int) -> None:
        """Drop tokens from the end; only those not computed yet, as the last drawn token is."""
        self._check_open()
        await self.engine._result(lambda call: m.Truncate(call, self.id, length))

    def close(self) -> None:
        """Free the KV; calls still running end with `Cancelled`. Safe to call twice."""
        if not self._closed:
            self._closed = True
            if self.engine._death is None and not self.engine._closed:
                self.engine._inbox.put(m.Close(self.id))

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Cancelled("the sequence is closed")

    def _send(self, message: m.Request) -> None:
        self._check_open()
        self.engine._send(message)


def _exception(event: m.Failed, cause: BaseException | None) -> errors.WeftError:
    kind: type[errors.WeftError] = getattr(errors, event.kind)
    if issubclass(kind, errors.RequestError):
        return kind(event.field, event.value, event.reason)
    error = kind(event.reason)
    error.__cause__ = cause
    return error
