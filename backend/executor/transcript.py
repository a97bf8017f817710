"""One state's history: tokens that the engine holds, and the text that they and the program's constants make.

Constants are encoded when the engine needs them, as one text however they were cut; drawn tokens stay
(`backend.borders`). Calls on one transcript are made one at a time, by its lane.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from weft.backend.borders import Border, encoded, shared
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence as Held
from weft.runtime.errors import Cancelled, EngineDead, RequestError
from weft.runtime.text.tokens import BOS
from weft.runtime.text.turns import turn_cuts

if TYPE_CHECKING:
    from weft.backend.executor.lane import Lane

_UNSURE = 8  # tokens
Scored = list[tuple[list[int], list[m.Logprob]]]
_ATTEMPTS = 3  # at a generation on cores that die


class Gates:
    """An engine refuses calls that its queue does not hold; those of one executor wait here in their place. A
    score is up to sixteen calls. Used from one event loop."""

    def __init__(self, engine: Engine) -> None:
        queue = engine.config.limits.queue
        self.calls, self.scores = asyncio.Semaphore(max(1, queue // 2)), asyncio.Semaphore(max(1, queue // 32))


class Transcript:
    """Owns its sequence, until `close`."""

    def __init__(self, engine: Engine, gates: Gates, namespace: str = "") -> None:
        self.engine = engine
        self._gates = gates
        self._namespace = namespace
        self.prompt_tokens = 0  # of the last generation
        self._pieces: list[str] = []
        self._fixed: list[int] = []  # tokens that no longer change
        self._open = ""  # the text behind them
        self._held: Held | None = None
        self._sent = 0  # tokens the sequence has: so many of `_fixed`, and behind them
        self._tail: list[int] = []
        self._excess = False  # the sequence has drawn tokens behind those
        self._closed = False
        self.owner: Lane | None = None  # told how many tokens it has more than it began with, and what that took
        self._counted = 0
        self._said = 0  # characters of `_open` that the sequence has tokens of
        # Since it began: text, with its tokens where they were drawn or are not to be read otherwise.
        self._own: list[tuple[str, list[int] | None]] = []
        self._turn = asyncio.Lock()
        self._source: tuple[asyncio.Task[_Forked], int] | None = None
        self._passed = 0  # characters that were in `_open` once, before those that are

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._own.append((text, None))
        self._open += text

    def replace_end(self, start: int, text: str) -> None:
        """Another text from character `start` on. Tokens that spell what is before it stay."""
        before = self.text[:start]
        decode, skip = self.engine.tokenizer.decode, 0 if self.text.startswith(BOS) else min(1, len(self._fixed))
        low, high = skip, len(self._fixed)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if before.startswith(decode(self._fixed[skip:middle])) else (low, middle - 1)
            )
        if self._sent > low:
            self._sent, self._tail = low, self._fixed[low : self._sent] + self._tail
        self._passed += len(self._open)
        self._open = before[len(decode(self._fixed[skip:low])) :] + text
        self._pieces, self._fixed, self._said = [before, text], self._fixed[:low], 0
        self._own = [("".join(own for own, _ in self._own)[: start - len(self.text)] + text, None)]

    @property
    def unsent(self) -> int:
        """Characters that the engine was not given yet."""
        return len(self._open) - self._said

    async def add_plain(self, text: str) -> None:
        """Text in which nothing is a special token. It is encoded by itself, as `text.chat.render` does between
        special tokens."""
        await self._add_tokens(text, self.engine.tokenizer.encode_plain(text))

    async def add_own(self, other: Transcript) -> None:
        """What another one says behind the fork that it began with: what was drawn keeps its tokens, what was
        read is encoded as one with what stands here."""
        for text, tokens in other._own:
            if tokens is None:
                self.add(text)
            else:
                await self._add_tokens(text, tokens)

    async def _add_tokens(self, text: str, tokens: list[int]) -> None:
        async with self._turn:
            await self._taken()
            before, _ = encoded(self.engine.tokenizer, self._open, self._fixed, Border(0, len(self._fixed)))
            self._passed += len(self._open)
            self._fixed, self._open, self._said = before + tokens, "", 0
            self._pieces.append(text)
            self._own.append((text, tokens))

    async def compute(self, deadline: float | None) -> None:
        """Have the engine run what it will need whatever comes: all but the last tokens, which may become others
        when more text follows."""
        async with self._turn:
            held = await self._ready(_UNSURE)
        async with self._gates.calls, self._working(held):
            before = held.computed
            await held.compute(deadline)
        if self.owner is not None and held.computed > before:
            took = m.Usage(history=self._sent + len(self._tail), computed=held.computed - before)
            self.owner.scope.tell("compute", self.owner.path, None, took)

    @asynccontextmanager
    async def _working(self, held: Held) -> AsyncIterator[None]:
        before = held.computed
        try:
            yield
        finally:
            if self.owner is not None:
                self.owner.scope.worked(held.computed - before)

    def lease(self, seconds: float) -> None:
        """While its program waits for something else, its KV is let go of later than that of others; 0 ends it."""
        if self._held is not None:
            self._held.pin(seconds)

    async def ready(self) -> Held:
        """The sequence, with all of the text."""
        async with self._turn:
            return await self._ready()

    async def succeed(self, other: Transcript) -> None:
        """Take the place of the one that it was forked from, which ends."""
        async with self._turn:
            await self._taken()
        self._own = other._own + self._own
        other.close()

    async def _taken(self) -> None:
        if self._source is not None:
            task, number = self._source
            with contextlib.suppress(EngineDead):  # then it is opened anew
                forked = await asyncio.shield(task)
                self._held, self._sent, self._tail = forked.children[number], forked.sent, list(forked.tail)
                self._counted = forked.sent + len(forked.tail)
            self._source = None
        if self._closed:
            raise Cancelled("the state has ended")

    async def _ready(self, unsure: int = 0, until: int | None = None) -> Held:
        """unsure: open tokens at the end that are left out. until: so many characters, `_passed` ones included."""
        await self._taken()
        text = self._open if until is None else self._open[: until - self._passed]
        tokens, border = encoded(self.engine.tokenizer, text, self._fixed, Border(0, len(self._fixed)))
        self._fixed, self._open = tokens[: border.tokens], self._open[border.chars :]
        self._passed += border.chars
        self._said = 0 if unsure else len(text) - border.chars
        tokens = tokens[: max(len(self._fixed), len(tokens) - unsure)]
        base = self._sent
        if self._held is not None:
            await self._correct(tokens, base + shared(self._tail, tokens[base:]))
        if self._held is None:
            self._held = self.engine.open(
                tokens, cuts=turn_cuts(self.engine.tokenizer, tokens), namespace=self._namespace
            )
        self._sent, self._tail = len(self._fixed), tokens[len(self._fixed) :]
        self._count()
        return self._held

    def _count(self) -> None:
        length = self._sent + len(self._tail)
        if self.owner is not None and length != self._counted:
            self.owner.grew(length - self._counted)
        self._counted = length

    async def _correct(self, tokens: list[int], length: int) -> None:
        """Make the sequence's tokens these; it has the first `length` of them."""
        assert self._held is not None
        if self._excess or length < self._sent + len(self._tail):
            try:
                await self._held.truncate(length)
            except RequestError:  # what would have to go was computed; the prefix cache knows the rest
                self._let_go()
                return
            self._excess = False
        more = tokens[length:]
        if more:
            self._held.extend(more, cuts=turn_cuts(self.engine.tokenizer, more))

    async def tokens(self) -> list[int]:
        """All of them."""
        await self.ready()
        return [*self._fixed, *self._tail]

    async def generate(
        self, params: SamplingParams, deadline: float | None, more: Callable[[m.Delta], None]
    ) -> m.Done:
        """Draw tokens; they and their text join the transcript. more: told of each piece; what it raises ends the
        generation. If a core dies, the next one draws the same."""
        params = msgspec.structs.replace(params, seed=random.getrandbits(63))
        drawn: list[int] = []
        text: list[str] = []
        for attempt in range(_ATTEMPTS):
            seen = len(text)
            held = await self.ready()
            self.prompt_tokens = len(self._fixed) + len(self._tail)
            try:
                async with self._gates.calls, aclosing(held.generate(params, deadline)) as events:
                    async for event in events:
                        if isinstance(event, m.Done):
                            self._take(drawn[: event.kept], "".join(text), excess=event.kept < len(drawn))
                            return event
                        if seen:
                            seen -= 1
                            continue
                        drawn += event.tokens
                        text.append(event.text)
                        more(event)
            except EngineDead:
                self._lost(attempt)
        raise AssertionError("a generation ends with Done or an exception")

    def _lost(self, attempt: int) -> None:
        """The core died, and the sequence with it, unless the next one hears of it; raises what is being handled
        if that happened too often."""
        self._let_go()
        if attempt == _ATTEMPTS - 1:
            raise

    def _take(self, kept: list[int], text: str, *, excess: bool) -> None:
        """These tokens were drawn, and the sequence has them; the text may go on behind them."""
        said = self.engine.tokenizer.decode(kept)
        self._fixed = [*self._fixed, *self._tail, *kept]
        self._passed += len(self._open)
        self._open, self._said = text[len(said) :], 0
        self._own += [(said, kept), (self._open, None)]
        self._sent, self._tail, self._excess = len(self._fixed), [], excess
        self._count()
        self._pieces.append(text)

    async def score(self, choices: Sequence[str], deadline: float | None) -> tuple[Scored, m.Usage]:
        """For each choice its tokens, from where the first of them all parts from the text's, and how likely; and
        what that took."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._score(choices, deadline)
            except EngineDead:
                self._lost(attempt)
        raise AssertionError("the last attempt returns or raises")

    async def _score(self, choices: Sequence[str], deadline: float | None) -> tuple[Scored, m.Usage]:
        held = await self.ready()
        base = len(self._fixed)
        own, known = self._tail, Border(0, base)
        whole = [encoded(self.engine.tokenizer, self._open + c, self._fixed, known)[0][base:] for c in choices]
        start = min(shared(own, tokens) for tokens in whole)
        parts = [tokens[start:] for tokens in whole]
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._gates.scores)
            if start < len(own):
                held = self.engine.open([*self._fixed, *own[:start]], namespace=self._namespace)
                stack.callback(held.close)
            await stack.enter_async_context(self._working(held))
            before = held.computed
            found = await held.score(parts, deadline=deadline)
            history, computed = base + start, held.computed - before
        cached = history - max(0, computed - sum(map(len, parts)))
        return list(zip(parts, found, strict=True)), m.Usage(history=history, cached=cached, computed=computed)

    def fork(self, count: int) -> list[Transcript]:
        """Others with this history. The engine forks now, behind what it was asked before; they wait for it when
        they first need it."""
        children = []
        task = None
        if self._pieces:
            until = self._passed + len(self._open)
            task = asyncio.get_running_loop().create_task(self._forked(count, until))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        for number in range(count):
            child = Transcript(self.engine, self._gates, self._namespace)
            child._pieces, child._fixed, child._open = [self.text], list(self._fixed), self._open
            child._source = (task, number) if task is not None else None
            children.append(child)
        return children

    async def _forked(self, count: int, until: int) -> _Forked:
        async with self._turn:  # in the order of the forks; what is asked of this one later comes behind them
            held = await self._ready(until=until)
            sent, tail = self._sent, list(self._tail)
        async with self._gates.calls, self._working(held):
            children = await held.fork(count)
        if self.owner is not None:
            self.owner.scope.tell("fork", self.owner.path, None, children[0].origin)
        return _Forked(children, sent, tail)

    def close(self) -> None:
        """Give the KV back. Nothing else can be asked of it then."""
        self._closed = True
        if self._source is not None:
            (task, number), self._source = self._source, None
            task.add_done_callback(lambda done: _close(done, number))
        self._let_go()

    def _let_go(self) -> None:
        held, self._held, self._excess = self._held, None, False
        if held is not None:
            held.close()


class _Forked:
    """Children of a fork, and the tokens they have (`Transcript._sent`, `_tail`)."""

    def __init__(self, children: list[Held], sent: int, tail: list[int]) -> None:
        self.children, self.sent, self.tail = children, sent, tail


def _close(task: asyncio.Task[_Forked], number: int) -> None:
    if not task.cancelled() and task.exception() is None:
        with contextlib.suppress(EngineDead):
            task.result().children[number].close()
