"""`Engine`: the boundary that backend and gateway see. Tokens and text in and out, no tensors, no torch import.

Methods are coroutines of whatever event loop calls them; several loops may share one engine. The core runs in a
thread of this process or in a process of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from weft.runtime import errors
from weft.runtime.config import ModelConfig
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.child import CoreProcess, check_driver
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.handle import Output, Sequence, absolute, remaining, within
from weft.runtime.engine.link import Link, ProcessLink, ThreadLink
from weft.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from weft.runtime.model.base import Network

Progress = Callable[[int, int, str], None]
EMBEDDED = Path(__file__).parent.parent / "embedded" / "weights"
_Arrival = tuple["asyncio.Queue[m.Answer]", m.Answer]
_PATIENCE = 0.5  # seconds beyond a deadline for the core to say so itself


class Engine:
    """A loaded model. Close it, or use it as a context manager.

    When the core dies, every waiting call ends with `EngineDead`, a new core takes its place, and sequences opened
    before are lost: their calls end with `EngineDead` too. After too many deaths the engine stays dead.
    """

    def __init__(
        self,
        source: Network | Path | str,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        process: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """source: a model in memory (with its tokenizer), or a checkpoint folder: weights in either layout,
        config.json and tokenizer.json. process: run the core in a process of its own; needs a folder.
        progress: called with (bytes done, bytes in all, shard) while the model loads; of a process,
        from a thread."""
        self.config = config or EngineConfig()
        self._ids = itertools.count(1)
        self._calls: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[m.Answer]]] = {}
        self._lock = threading.Lock()
        self._death: errors.EngineDead | None = None
        self._closed = False
        self._progress = progress
        if isinstance(source, (str, Path)):
            source = Path(source)
            if process and tokenizer is not None:
                raise errors.ConfigError("tokenizer", tokenizer, "a process reads the one of the folder")
            self.model_config = ModelConfig.load(source)
            self.tokenizer = tokenizer or Tokenizer.load(source)
        else:
            if tokenizer is None:
                raise errors.ConfigError("tokenizer", None, "a model in memory needs one")
            self.model_config = source.config
            self.tokenizer = tokenizer
        if self.tokenizer.size > self.model_config.vocab_size:
            raise errors.CheckpointError(
                f"the tokenizer defines {self.tokenizer.size} ids, the model {self.model_config.vocab_size}"
            )
        self.capacity = self.config.capacity(self.model_config)
        self._link = self._connect(source, process, progress)

    @classmethod
    def load(
        cls, path: Path | str, config: EngineConfig | None = None, progress: Progress | None = None
    ) -> Engine:
        """An engine over a checkpoint folder, its core in a thread."""
        return cls(path, config=config, progress=progress)

    @classmethod
    def embedded(cls, config: EngineConfig | None = None) -> Engine:
        """An engine over the small trained model that comes with Weft (`runtime/embedded/weights/README.md`), its
        core in a thread."""
        return cls(EMBEDDED, config=config)

    def _connect(self, source: Network | Path, process: bool, progress: Progress | None) -> Link:
        # The host imports torch; a front whose core lives elsewhere never does.
        restarts = self.config.limits.restarts
        if process:
            if not isinstance(source, Path):
                raise errors.ConfigError("process", True, "needs a checkpoint folder: a model cannot move")
            check_driver(self.config)
            return ProcessLink(
                CoreProcess(source.resolve(), self.config), self._deliver_all, self._on_death, restarts
            )
        host: Any = import_module("weft.runtime.engine.host")
        model = host.load_model(source, self.config, progress) if isinstance(source, Path) else source
        make = host.core_maker(model, self.tokenizer, self.config)
        return ThreadLink(make, self._deliver, self._on_death, restarts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the core; calls still waiting end with `Cancelled`. Safe to call twice."""
        if not self._closed:
            self._closed = True
            if self._death is None:
                self._link.close()
            # Calls whose message came too late for the core.
            self._fail_all("Cancelled", "the engine was closed")

    @property
    def context(self) -> int:
        """Tokens of the longest history."""
        return self.config.pools.context

    @property
    def slots(self) -> int:
        """Sequences with KV at one time, forks included."""
        return self.config.pools.slots

    # -- sequences --------------------------------------------------------------------------------------

    def open(self, content: str | Seq[int], *, cuts: Seq[int] = (), namespace: str = "") -> Sequence:
        """A sequence with this history. Text is encoded as it stands: no BOS is added.

        cuts: lengths at which other histories may part from it; state is kept there. namespace: what is computed
        for one namespace is found from, and told to, that one only."""
        tokens = self.tokens(content)
        sequence = Sequence(self, self.new_id())
        self.send(m.Open(sequence.id, tokens, within(cuts, len(tokens)), namespace))
        return sequence

    async def explain(self, content: str | Seq[int], *, namespace: str = "") -> m.Explained:
        """How a sequence with this history would begin now: what of it is known, what would be run, and where it
        parts from what is known. Changes nothing."""
        tokens = self.tokens(content)
        done = await self.result(lambda call: m.Explain(call, tokens, namespace))
        assert done.explained is not None
        return done.explained

    async def stats(self) -> m.Stats:
        """How full it is."""
        done = await self.result(lambda call: m.Look(call))
        assert done.stats is not None
        return done.stats

    @property
    def dead(self) -> bool:
        """Whether its core has died for good."""
        return self._death is not None

    def flush(self) -> None:
        """Forget the KV of histories that are not open. Costs time only: results stay the same."""
        self.post(m.Flush())

    async def generate(
        self,
        prompt: str | Seq[int],
        params: SamplingParams,
        deadline: float | None = None,
        *,
        prompt_logprobs: int | None = None,
    ) -> Output:
        """One-shot: open, generate, close. deadline: seconds from now.
        prompt_logprobs: also score the prompt's tokens but the first, with that many alternatives each."""
        if prompt_logprobs is None:
            with self.open(prompt) as sequence:
                return await sequence.complete(params, deadline)
        at = absolute(deadline)
        with self.open([]) as sequence:
            scored = await sequence.append_scored(self.tokens(prompt), prompt_logprobs, deadline)
            return dataclasses.replace(await sequence.complete(params, remaining(at)), prompt_logprobs=scored)

    async def sample(
        self, prompt: str | Seq[int], params: SamplingParams, n: int, deadline: float | None = None
    ) -> list[Output]:
        """n outputs of one prompt, which is computed once. Output i draws with seed + i if a seed is given."""
        at = absolute(deadline)
        with self.open(prompt) as sequence:
            children = await sequence.fork(n, deadline)
            seeds = [None if params.seed is None else params.seed + i for i in range(n)]
            try:
                runs = [
                    child.complete(msgspec.structs.replace(params, seed=seed), remaining(at))
                    for child, seed in zip(children, seeds, strict=True)
                ]
                return list(await asyncio.gather(*runs))
            finally:
                for child in children:
                    child.close()

    # -- for `Sequence` ---------------------------------------------------------------------------------

    def new_id(self) -> int:
        return next(self._ids)

    def tokens(self, content: str | Seq[int]) -> list[int]:
        """Token ids of text, or the given ids once they are known to be in the vocabulary."""
        if isinstance(content, str):
            try:
                return self.tokenizer.encode(content)
            except TypeError:  # what the library says of lone surrogates
                raise errors.RequestError("text", content, "not Unicode text") from None
        vocabulary = self.model_config.vocab_size
        for token in content:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise errors.RequestError("tokens", token, f"not in a vocabulary of {vocabulary}")
        return list(content)

    def send(self, message: m.Request) -> None:
        if self._closed:
            raise errors.EngineDead("the engine is closed")
        if self._death is not None:
            raise errors.EngineDead(str(self._death)) from self._death
        self._link.send(message)

    def post(self, message: m.Request) -> None:
        """`send` for messages that mean nothing to an engine that has ended."""
        if not self._closed and self._death is None:
            self._link.send(message)

    async def call(self, make: Callable[[int], m.Call]) -> AsyncGenerator[m.Delta | m.Done]:
        """Send a call and yield its events up to Done; leaving early cancels it."""
        number = self.new_id()
        message = make(number)
        events: asyncio.Queue[m.Answer] = asyncio.Queue()
        with self._lock:
            self._calls[number] = (asyncio.get_running_loop(), events)
        finished = False
        try:
            self.send(message)
            deadline = getattr(message, "deadline", None)
            while not finished:
                event = await (events.get() if deadline is None else _before(deadline, events))
                finished = not isinstance(event, m.Delta)
                if isinstance(event, m.Failed):
                    raise _exception(event)
                yield event
        finally:
            with self._lock:
                self._calls.pop(number, None)
            if not finished:
                self.post(m.Cancel(number))

    async def result(self, make: Callable[[int], m.Call]) -> m.Done:
        """The Done of a call without deltas."""
        async for event in self.call(make):
            if isinstance(event, m.Done):
                return event
        raise AssertionError("a call ends with Done or an exception")

    # -- from the link's thread -------------------------------------------------------------------------

    def _deliver(self, event: m.Event) -> None:
        self._deliver_all([event])

    def _deliver_all(self, events: Seq[m.Event]) -> None:
        """Hand events to the loops that wait for them. Each loop is woken once, however many are for it: a step
        gives one to every call, and a wake-up is dearer than all that is done with an event."""
        batches: dict[asyncio.AbstractEventLoop, list[_Arrival]] = {}
        for event in events:
            if isinstance(event, m.Loading):
                if self._progress is not None:
                    self._progress(event.done, event.total, event.shard)
                continue
            with self._lock:
                waiting = self._calls.get(event.call)
            if waiting is not None:  # or the caller has left; its Cancel is on the way
                batches.setdefault(waiting[0], []).append((waiting[1], event))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:
                # The loop was closed with calls still open: nobody can receive their events any more.
                for _, event in batch:
                    with self._lock:
                        self._calls.pop(event.call, None)
                    self.post(m.Cancel(event.call))

    def _on_death(self, reason: errors.EngineDead, final: bool) -> None:
        if final:
            self._death = reason
        self._fail_all("EngineDead", str(reason))

    def _fail_all(self, kind: str, reason: str) -> None:
        with self._lock:
            waiting = list(self._calls)
        self._deliver_all([m.Failed(call, kind, reason) for call in waiting])


def _put(batch: Seq[_Arrival]) -> None:
    for events, event in batch:
        events.put_nowait(event)


async def _before(deadline: float, events: asyncio.Queue[m.Answer]) -> m.Answer:
    """The next event. The core ends a call at its deadline, but not while it is being replaced."""
    try:
        async with asyncio.timeout(deadline + _PATIENCE - time.monotonic()):
            return await events.get()
    except TimeoutError:
        raise errors.DeadlineExceeded("the deadline passed and the core does not answer") from None


def _exception(event: m.Failed) -> errors.WeftError:
    kind: type[errors.WeftError] = getattr(errors, event.kind)
    if issubclass(kind, errors.RequestError):
        return kind(event.field, event.value, event.reason)
    return kind(event.reason)
