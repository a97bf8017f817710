"""`Sequence`: one history in an engine, as its owner sees it."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import msgspec

from weft.runtime import errors
from weft.runtime.decoding.params import MAX_TOP_LOGPROBS, SamplingParams
from weft.runtime.engine import messages as m

if TYPE_CHECKING:
    from weft.runtime.engine.front import Engine

# Continuations scored in one batch; each holds a slot meanwhile.
_SCORED_TOGETHER = 16


@dataclass(frozen=True)
class Output:
    """A finished generation. tokens: all drawn, the stop included; text: without it.
    kept: how many of the tokens lie wholly in the text. prompt_logprobs: if they were asked for."""

    tokens: list[int]
    text: str
    logprobs: list[m.Logprob]
    finish_reason: str
    stop: str | int | None
    kept: int
    usage: m.Usage
    prompt_logprobs: list[m.Logprob] = field(default_factory=list)


class Sequence:
    """One history in an engine. Calls on it run in the order they are made.

    A call takes a deadline in seconds from now; when it has passed, the call ends with `DeadlineExceeded` and the
    history keeps the tokens it has. Cancelling the task that awaits a call has the same effect.
    Owned by whoever opened or forked it; `close` frees its KV (forks keep what they share). Usable as a context
    manager.
    """

    def __init__(self, engine: Engine, id: int) -> None:
        self.engine = engine
        self.id = id
        # What the fork that made this sequence took: how much of the history was cached, how much computed.
        self.origin = m.Usage()
        self.computed = 0  # tokens that calls on it have run, generations apart
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extend(self, content: str | Seq[int], *, cuts: Seq[int] = ()) -> None:
        """Append tokens, or text as the tokenizer splits it alone. cuts: places within it, 0 to its tokens, at
        which other histories may part from this one; state is kept there."""
        tokens = self.engine.tokens(content)
        self._send(m.Extend(self.id, tokens, within(cuts, len(tokens))))

    def generate(self, params: SamplingParams, deadline: float | None = None) -> AsyncGenerator[m.Delta | m.Done]:
        """Deltas as tokens are drawn, then Done. The drawn tokens join the history."""

        def make(call: int) -> m.Generate:  # when the first event is asked for
            own = params.validate()
            if own.seed is None:
                own = msgspec.structs.replace(own, seed=random.getrandbits(63))
            self._check_open()
            return m.Generate(call, self.id, own, absolute(deadline))

        # The call's own generator: every token would pass through one around it, and closing that one early would
        # leave the call to the garbage collector.
        return self.engine.call(make)

    async def complete(self, params: SamplingParams, deadline: float | None = None) -> Output:
        """`generate`, gathered."""
        tokens: list[int] = []
        text: list[str] = []
        logprobs: list[m.Logprob] = []
        async for event in self.generate(params, deadline):
            if isinstance(event, m.Delta):
                tokens += event.tokens
                text.append(event.text)
                logprobs += event.logprobs
            else:
                return Output(
                    tokens, "".join(text), logprobs, event.finish_reason, event.stop, event.kept, event.usage
                )
        raise AssertionError("a generation ends with Done or an exception")

    async def fork(self, count: int = 1, deadline: float | None = None) -> list[Sequence]:
        """`count` sequences with this history, which is computed once and shared."""
        if count < 1:
            raise errors.RequestError("count", count, "must be at least 1")
        self._check_open()
        children = [Sequence(self.engine, self.engine.new_id()) for _ in range(count)]
        ids = [child.id for child in children]
        at = absolute(deadline)
        try:
            done = await self.engine.result(lambda call: m.Fork(call, self.id, ids, at))
        except BaseException:
            for child in children:  # a cancelled fork may have made them already
                child.close()
            raise
        for child in children:
            child.origin = done.usage
        self.computed += done.usage.computed
        return children

    async def compute(self, deadline: float | None = None) -> None:
        """Run what was appended now, so that later calls need not."""
        self._check_open()
        at = absolute(deadline)
        done = await self.engine.result(lambda call: m.Fork(call, self.id, [], at))
        self.computed += done.usage.computed

    async def append_scored(
        self, tokens: Seq[int], top: int = 0, deadline: float | None = None
    ) -> list[m.Logprob]:
        """Append tokens; the log-probability of each (of all but the first, if the history was empty)."""
        self._check_open()
        ids = self.engine.tokens(tokens)
        if type(top) is not int or not 0 <= top <= MAX_TOP_LOGPROBS:
            raise errors.RequestError("top", top, f"not in 0..{MAX_TOP_LOGPROBS}")
        at = absolute(deadline)
        done = await self.engine.result(lambda call: m.Score(call, self.id, ids, top, at))
        self.computed += done.usage.computed
        return done.logprobs

    async def score(
        self, continuations: Seq[Seq[int]], top: int = 0, deadline: float | None = None
    ) -> list[list[m.Logprob]]:
        """Log-probabilities of the tokens of each continuation of this history, which stays as it is."""
        at = absolute(deadline)
        out: list[list[m.Logprob]] = []
        together = max(1, min(_SCORED_TOGETHER, self.engine.slots - 1))
        for start in range(0, len(continuations), together):
            part = continuations[start : start + together]
            children = await self.fork(len(part), remaining(at))
            try:
                left = remaining(at)
                scored = (child.append_scored(c, top, left) for child, c in zip(children, part, strict=True))
                out += await asyncio.gather(*scored)
            finally:
                for child in children:
                    self.computed += child.computed
                    child.close()
        return out

    async def truncate(self, length: int) -> None:
        """Drop tokens from the end; only those not computed yet, as the last drawn token is."""
        self._check_open()
        if type(length) is not int or not 0 <= length < 1 << 63:
            raise errors.RequestError("length", length, "must be an integer, not negative")
        await self.engine.result(lambda call: m.Truncate(call, self.id, length))

    def pin(self, seconds: float) -> None:
        """While nothing is asked of it, as during a wait for a tool, its KV is taken after that of other sequences
        without calls; 0 ends it. Taken or not, results are the same."""
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise errors.RequestError("seconds", seconds, "must be a number, not negative")
        self._send(m.Pin(self.id, time.monotonic() + seconds))

    def close(self) -> None:
        """Free the KV; calls still running end with `Cancelled`. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.engine.post(m.Close(self.id))

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Cancelled("the sequence is closed")

    def _send(self, message: m.Request) -> None:
        self._check_open()
        self.engine.send(message)


def within(cuts: Seq[int], length: int) -> list[int]:
    """The cuts, once they are known to be lengths up to this one."""
    for cut in cuts:
        if type(cut) is not int or not 0 <= cut <= length:
            raise errors.RequestError("cuts", cut, f"not in 0..{length}")
    return list(cuts)


def remaining(at: float | None) -> float | None:
    """Seconds to a point of the monotonic clock; `DeadlineExceeded` if it has passed."""
    if at is None:
        return None
    left = at - time.monotonic()
    if left <= 0:
        raise errors.DeadlineExceeded("the deadline passed before all parts of the call had begun")
    return left


def absolute(deadline: float | None) -> float | None:
    """Seconds from now -> a point of the monotonic clock, which all processes of a machine share."""
    if deadline is None:
        return None
    if deadline <= 0:
        raise errors.RequestError("deadline", deadline, "must be positive")
    return time.monotonic() + deadline
