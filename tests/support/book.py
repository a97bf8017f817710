"""A core driven by hand, and a book of what every history must be and how every call may end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from support.engine import EOS, UNPAGED, byte_tokenizer, drawn_again, free, kept, small_model
from support.pools import poison
from support.run import run
from weft.runtime.cache.capacity import KINDS, TOKENS_PER_ROW, PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.config import CoreLimits
from weft.runtime.engine.core import Core


class History:
    """What a sequence must hold. tokens: up to the first call that has not ended."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.calls: list[Asked] = []


class Asked:
    """A call that has not ended, and what came of it so far. after: tokens appended behind it."""

    def __init__(self, message: Any, history: History) -> None:
        self.message, self.history = message, history
        self.drawn: list[int] = []
        self.logprobs: list[m.Logprob] = []
        self.text = ""
        self.after: list[int] = []
        self.cancelled = self.expired = self.refused = False

    def is_next(self) -> bool:
        return self.history.calls[0] is self

    def final_length(self) -> int:
        """Tokens of the history when it has ended well."""
        message = self.message
        more = {m.Generate: lambda: message.params.max_tokens, m.Score: lambda: len(message.tokens)}
        return len(self.history.tokens) + more.get(type(message), lambda: 0)()


class Book:
    """Everything sent goes through here. `heard` verifies each event when it comes."""

    def __init__(
        self,
        page: int,
        slots: int,
        chunk: int,
        spare: int,
        context: int,
        queue: int,
        checkpoints: int,
        drafts: int,
    ) -> None:
        """spare: compressed pages beyond those of one sequence as long as the context, negative if too few."""
        sizes = PoolSizes(context, slots, context, chunk, page, checkpoints)
        self.pools = Pools(small_model().config, sizes)
        for kind in ("c4", "c128"):
            allocator = self.pools.allocators[kind]
            for _ in range(min(2 * slots - spare, allocator.total - 1)):
                allocator.alloc()
        self.kept_back = {kind: list(self.pools.allocators[kind]._holders) for kind in KINDS}
        self.core = Core(small_model(), self.pools, byte_tokenizer(), CoreLimits(chunk, drafts, queue), self.heard)
        self.queue = queue
        self.open: dict[int, History] = {}
        self.calls: dict[int, Asked] = {}
        self.ids = iter(range(1, 1 << 30))

    # -- messages in ------------------------------------------------------------------------------------

    def begin(self, tokens: list[int]) -> int:
        id = next(self.ids)
        self.open[id] = History(list(tokens))
        self.core.handle(m.Open(id, tokens))
        return id

    def extend(self, id: int, tokens: list[int]) -> None:
        history = self.open[id]
        (history.calls[-1].after if history.calls else history.tokens).extend(tokens)
        self.core.handle(m.Extend(id, tokens))

    def generate(self, id: int, params: SamplingParams) -> None:
        self._ask(m.Generate(next(self.ids), id, params.validate()))

    def score(self, id: int, tokens: list[int], top: int) -> None:
        self._ask(m.Score(next(self.ids), id, tokens, top))

    def fork(self, id: int, count: int) -> list[int]:
        children = [next(self.ids) for _ in range(count)]
        self._ask(m.Fork(next(self.ids), id, children))
        return children

    def _ask(self, message: Any) -> None:
        asked = Asked(message, self.open[message.sequence])
        asked.refused = len(self.calls) >= self.queue
        self.calls[message.call] = asked
        asked.history.calls.append(asked)
        self.core.handle(message)
        assert (message.call not in self.calls) == asked.refused

    def truncate(self, id: int, back: int) -> None:
        history = self.open[id]
        length = len(history.tokens) - back
        possible = not history.calls and self.core.sequences[id].fixed <= length <= len(history.tokens)
        answers: list[m.Event] = []
        self.core.emit = answers.append
        self.core.handle(m.Truncate(next(self.ids), id, length))
        self.core.emit = self.heard
        if possible:
            del history.tokens[length:]
        (answer,) = answers
        assert isinstance(answer, m.Done) == possible
        assert possible or (isinstance(answer, m.Failed) and answer.field == "length")

    def cancel(self, call: int) -> None:
        self.calls[call].cancelled = True
        self.core.handle(m.Cancel(call))
        assert call not in self.calls

    def expire(self, call: int) -> None:
        """Its deadline passes, running or queued; the next step ends it."""
        self.calls[call].expired = True
        self.core.calls[call].deadline = 0.0

    def close(self, id: int) -> None:
        history = self.open[id]
        for asked in history.calls:
            asked.cancelled = True
        self.core.handle(m.Close(id))
        assert not history.calls
        del self.open[id]

    def step(self) -> None:
        if self.core.has_work():
            self.core.step()
        assert not any(asked.expired for asked in self.calls.values())
        self.all_is_accounted_for()

    def settle(self) -> None:
        """Until every call has ended; a few hundred steps are far more than they take."""
        for _ in range(500):
            if self.calls:
                self.step()
        assert not self.calls, "they hang"

    def finish(self) -> None:
        self.settle()
        for id in list(self.open):
            self.close(id)
        for kind, holders in self.kept_back.items():
            for page in [page for page, count in enumerate(holders) if count]:
                self.pools.allocators[kind].release(page)
        assert free(self.pools, self.core.memory.prefix)

    # -- messages out -----------------------------------------------------------------------------------

    def heard(self, event: m.Event) -> None:
        asked = self.calls[event.call]
        if isinstance(event, m.Delta):
            assert asked.is_next()
            asked.drawn += event.tokens
            asked.logprobs += event.logprobs
            asked.text += event.text
            return
        del self.calls[event.call]
        if isinstance(event, m.Done):
            assert asked.is_next() and not (asked.cancelled or asked.expired or asked.refused)
            assert (
                event.usage.history == len(asked.history.tokens)
                and asked.final_length() <= self.pools.sizes.context
            )
        self.verify_drawn(asked)
        match asked.message, event:
            case m.Generate(), m.Done():
                self.verify_end(asked, event)
            case m.Score(tokens=tokens, top=top), m.Done():
                assert [entry.token for entry in event.logprobs] == tokens[not asked.history.tokens :]
                verify_logprobs(asked.history.tokens + tokens, event.logprobs, top)
            case m.Fork(children=children), m.Done():
                self.open |= {child: History(list(asked.history.tokens)) for child in children}
            case _, m.Failed():
                self.verify_failure(asked, event)
        self.ended(asked, scored=isinstance(event, m.Done))
        assert isinstance(event, m.Failed) or event.length <= len(asked.history.tokens)

    def ended(self, asked: Asked, scored: bool) -> None:
        """What the call has made is history; what was appended behind it waits for the call before it, if any."""
        history = asked.history
        place = history.calls.index(asked)
        if isinstance(asked.message, m.Score) and (scored or self.taken(asked)):
            history.tokens += asked.message.tokens
        history.tokens += asked.drawn
        (history.calls[place - 1].after if place else history.tokens).extend(asked.after)
        del history.calls[place]

    def taken(self, asked: Asked) -> bool:
        """Whether tokens to score have joined the history, which they do when the core turns to them."""
        sequence = self.core.sequences.get(asked.message.sequence)
        if sequence is None or not asked.is_next():
            return False
        behind = 0 if asked.message.call in self.calls else len(asked.after)  # joins when the call ends
        return len(sequence.tokens) > len(asked.history.tokens) + behind

    def verify_drawn(self, asked: Asked) -> None:
        """Of calls that were cut short, too."""
        if asked.drawn:
            params: SamplingParams = asked.message.params
            before = asked.history.tokens
            assert asked.drawn == drawn_again(before, asked.drawn, params)
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
            assert not stops.intersection(asked.drawn[:-1])
            if params.logprobs is not None:
                assert [entry.token for entry in asked.logprobs] == asked.drawn
                verify_logprobs(before + asked.drawn, asked.logprobs, params.logprobs)

    def verify_end(self, asked: Asked, done: m.Done) -> None:
        params: SamplingParams = asked.message.params
        stopped = done.finish_reason == "stop"
        assert stopped or (done.finish_reason, len(asked.drawn)) == ("length", params.max_tokens)
        assert not stopped or done.stop == asked.drawn[-1]
        assert asked.text == byte_tokenizer().decode(asked.drawn[: len(asked.drawn) - stopped])
        assert (done.usage.generated, done.kept) == (len(asked.drawn), len(asked.drawn) - stopped)

    def verify_failure(self, asked: Asked, event: m.Failed) -> None:
        """The kind has its cause. The eldest call never gives way, unless it asks for more than there is."""
        match event.kind:
            case "Cancelled":
                assert asked.cancelled
            case "DeadlineExceeded":
                assert asked.expired
            case "ContextLengthError":
                assert asked.is_next() and not asked.drawn
                assert asked.final_length() > self.pools.sizes.context
            case "RequestError":
                assert asked.is_next() and isinstance(asked.message, m.Generate) and not asked.history.tokens
            case "Overloaded" if not asked.refused:
                eldest = min(history.calls[0].message.call for history in self.open.values() if history.calls)
                assert asked.is_next() and (asked.message.call > eldest or not self.fits(asked))
            case kind:
                assert asked.refused and kind == "Overloaded"

    def fits(self, asked: Asked) -> bool:
        """Whether the call could end well if it were alone."""
        free_pages = {kind: holders[1:].count(0) for kind, holders in self.kept_back.items()}
        entries = {kind: asked.final_length() // TOKENS_PER_ROW[kind] for kind in ("c4", "c128")}
        pages = all(-(-count // self.pools.sizes.page) <= free_pages[kind] for kind, count in entries.items())
        return pages and len(getattr(asked.message, "children", ())) < self.pools.sizes.slots

    # -- memory -----------------------------------------------------------------------------------------

    def all_is_accounted_for(self) -> None:
        sequences = self.core.sequences
        assert sequences.keys() == self.open.keys() and self.core.calls.keys() == self.calls.keys()
        for id, history in self.open.items():
            expected = list(history.tokens)
            if history.calls:
                first = history.calls[0]
                expected += first.message.tokens if is_score(first) and self.taken(first) else first.drawn
            assert sequences[id].tokens == expected
        states = [sequence.state for sequence in sequences.values() if sequence.state is not None]
        self.pools.check()
        assert self.pools.free_slots == self.pools.sizes.slots - len(states)
        known = kept(self.core.memory.prefix)
        for kind in KINDS:
            held = known[kind] + Counter(page for state in states for page in state.pages[kind].values())
            holders = self.pools.allocators[kind]._holders
            assert holders == [kept + held[page] for page, kept in enumerate(self.kept_back[kind])]
        poison(self.pools)


def is_score(asked: Asked) -> bool:
    return isinstance(asked.message, m.Score)


def verify_logprobs(tokens: list[int], found: list[m.Logprob], top: int) -> None:
    """Of the last tokens, to the bit."""
    if found:
        table = torch.log_softmax(run(small_model(), tokens[:-1], page=UNPAGED)[-len(found) :], dim=-1)
        for entry, row in zip(found, table, strict=True):
            values, ids = row[: byte_tokenizer().size].sort(descending=True, stable=True)
            assert entry.logprob == row[entry.token].item()
            assert entry.top == list(zip(ids[:top].tolist(), values[:top].tolist(), strict=True))
