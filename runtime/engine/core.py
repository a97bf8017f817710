"""The engine core: a state machine that takes messages, runs one batched step at a time, and emits events.

Owns the model, the pools and every sequence. Single-threaded: whoever runs it calls `handle` and `step` in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from weft.runtime.cache.pools import Pools
from weft.runtime.decoding.grammar import Grammars
from weft.runtime.decoding.outline import Beginning, Outline
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import sample
from weft.runtime.engine import messages as m
from weft.runtime.engine.calls import Call, ForkCall, GenerateCall, ScoreCall, asked_logprobs
from weft.runtime.engine.config import CoreLimits
from weft.runtime.engine.schedule import Scheduler, Work
from weft.runtime.engine.sequences import Memory, Sequence
from weft.runtime.engine.speculate import Drafter
from weft.runtime.engine.watch import Watch
from weft.runtime.errors import (
    Cancelled,
    ContextLengthError,
    DeadlineExceeded,
    EngineDead,
    Overloaded,
    RequestError,
    WeftError,
)
from weft.runtime.model.base import Network
from weft.runtime.model.batch import Batch
from weft.runtime.model.verify import TakeBack
from weft.runtime.text.tokenizer import Tokenizer

_MOMENT = 0.0005  # seconds


class Core:
    """`emit` receives every event, in order, in the thread that runs the core."""

    def __init__(
        self,
        model: Network,
        pools: Pools,
        tokenizer: Tokenizer,
        limits: CoreLimits,
        emit: Callable[[m.Event], None],
    ) -> None:
        self.model = model
        self.pools = pools
        drafts = limits.drafts if model.config.has_mtp else 0
        self.memory = Memory(pools, mtp=drafts > 0)
        self.scheduler = Scheduler(self.memory, limits.chunk, drafts, certain=limits.drafts > 0)
        self.drafter = Drafter(model, tokenizer.size)
        self._grammars: Grammars | None = None
        self.tokenizer = tokenizer
        self.limits = limits
        self.emit = emit
        self.sequences: dict[int, Sequence] = {}
        self.calls: dict[int, Call] = {}

    @property
    def grammars(self) -> Grammars:
        """Made when the first is asked for."""
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer)
        return self._grammars

    # -- messages ---------------------------------------------------------------------------------------

    def handle(self, message: m.Request) -> None:
        """Apply one message. A request that is wrong fails its own call only."""
        match message:
            case m.Open(sequence, tokens, cuts, namespace):
                self.sequences[sequence] = Sequence(list(tokens), namespace, cuts)
            case m.Extend(sequence, tokens, cuts):
                if sequence in self.sequences:
                    self._extend(self.sequences[sequence], tokens, cuts)
            case m.Close(sequence):
                self._close(sequence)
            case m.Cancel(number):
                if number in self.calls:
                    self._fail(self.calls[number], Cancelled("cancelled by the caller"))
            case m.Explain(call, tokens, namespace):
                explained = self.memory.explain(tokens, namespace)
                self.emit(m.Done(call=call, usage=m.Usage(), length=len(tokens), explained=explained))
            case m.Look(call):
                stats = self.memory.stats(len(self.calls))
                self.emit(m.Done(call=call, usage=m.Usage(), length=0, stats=stats))
            case m.Pin(sequence, until):
                if sequence in self.sequences:
                    self.sequences[sequence].pinned = until
            case m.Flush():
                self.memory.prefix.clear()
            case m.Stop():
                for waiting in list(self.calls.values()):
                    self._fail(waiting, Cancelled("the engine was closed"))
                if self._grammars is not None:
                    self._grammars.close()
            case _:
                self._accept(message)

    def _accept(self, message: m.Truncate | m.Fork | m.Generate | m.Score) -> None:
        """Start a call, or answer why not."""
        sequence = self.sequences.get(message.sequence)
        if sequence is None:
            self.emit(
                m.Failed.of(message.call, EngineDead("the sequence was lost when the engine core was replaced"))
            )
            return
        match message:
            case m.Truncate(call, _, length):
                self._truncate(call, sequence, length)
            case m.Fork(call, _, children):
                self._submit(ForkCall(call, sequence, children), message)
            case m.Score(call, _, tokens, top):
                self._submit(ScoreCall(call, sequence, tokens, top, self.tokenizer.size), message)
            case m.Generate(call, _, params):
                try:
                    self._submit(
                        GenerateCall(call, sequence, params, self.tokenizer, self._outline(params)), message
                    )
                except RequestError as error:  # a stop_regex that RE2 refuses, an id the tokenizer lacks
                    self.emit(m.Failed.of(call, error))

    def _outline(self, params: SamplingParams) -> Outline | Beginning | None:
        if params.grammar is None:
            return Beginning(params.begins, self.tokenizer) if params.begins else None
        return Outline(self.grammars.constraint(params.grammar), self.tokenizer)

    def _submit(self, call: Call, message: m.Fork | m.Score | m.Generate) -> None:
        call.deadline, call.submitted = message.deadline, message.sent
        if len(self.calls) >= self.limits.queue:
            self.emit(m.Failed.of(call.id, Overloaded(f"{len(self.calls)} calls are waiting")))
            return
        self.calls[call.id] = call
        call.sequence.calls.append(call)

    def _extend(self, sequence: Sequence, tokens: list[int], cuts: list[int]) -> None:
        """Behind calls that still run, the tokens wait: those calls see the history they were made for."""
        (sequence.calls[-1] if sequence.calls else sequence).append(tokens, cuts)

    def _truncate(self, call: int, sequence: Sequence, length: int) -> None:
        if sequence.calls or not sequence.fixed <= length <= len(sequence.tokens):
            reason = f"not in {sequence.fixed}..{len(sequence.tokens)}, or the sequence is busy"
            self.emit(m.Failed.of(call, RequestError("length", length, reason)))
            return
        del sequence.tokens[length:]
        self.emit(m.Done(call=call, usage=m.Usage(), length=length))

    def _close(self, number: int) -> None:
        sequence = self.sequences.pop(number, None)
        if sequence is None:
            return  # the child of a fork that failed or was cancelled
        for call in list(sequence.calls):
            self._fail(call, Cancelled("its sequence was closed"))
        self.memory.let_go(sequence, checkpoint=False)

    # -- one step ---------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self.calls)

    def step(self) -> None:
        """Run one batch: a token of every decoding call, and prefill chunks up to the budget."""
        self._expire()
        self._advance()
        heads = sorted(self._heads(), key=lambda call: call.id)
        active = [call for call in heads if call.left or not _waits(call)]
        if heads and not active:
            time.sleep(_MOMENT)  # for grammars
            return
        while active:
            self.scheduler.begin(active)
            if self._can_advance(active):
                self._advance()  # what it needs was known
                return
            work = self.scheduler.work(active)
            if work:
                break
            served = self.scheduler.take_memory(active, self.sequences.values())
            if served is None and any(map(_waits, heads)):
                time.sleep(_MOMENT)  # one that holds memory waits for its grammar
                return
            if served is None:
                self._fail(active[0], Overloaded("no KV memory left and no running call will free any"))
                return
            active = served
        else:
            return
        streams, before, watch = self._forward(work)
        for item, rows, previous in zip(work, streams, before, strict=True):
            item.call.ran(item.tokens, rows, previous, self.model)
            self.memory.passed(item.call.sequence, len(item.tokens))
        for item in work:
            if item.drafts:
                self._finish_if_done(item.generating)
        self._advance()
        self.scheduler.took(work, watch)

    def _can_advance(self, active: list[Call]) -> bool:
        """Whether `_advance` would do something."""
        return any(not call.left for call in active)

    def _expire(self) -> None:
        """End the calls whose deadline has passed, running or queued."""
        now = time.monotonic()
        for call in list(self.calls.values()):
            if call.deadline is not None and now >= call.deadline:
                self._fail(call, DeadlineExceeded("the deadline passed before the call had finished"))

    def _heads(self) -> list[Call]:
        """The call whose turn it is on each sequence, refused if it cannot end well."""
        heads = []
        for sequence in dict.fromkeys(call.sequence for call in self.calls.values()):
            while sequence.calls:
                call = sequence.calls[0]
                error = self._refusal(call)
                if error is None:
                    call.take_turn()
                    heads.append(call)
                    break
                self._fail(call, error)
        return heads

    def _refusal(self, call: Call) -> WeftError | None:
        limit = self.pools.sizes.context
        if call.final_length() > limit:
            return ContextLengthError("tokens", call.final_length(), f"the context holds {limit}")
        if isinstance(call, GenerateCall) and not call.sequence.tokens:
            return RequestError("tokens", [], "cannot generate from an empty history")
        return call.failure if isinstance(call, GenerateCall) else None

    def _forward(self, work: list[Work]) -> tuple[list[Tensor], Tensor, Watch]:
        """Run the work, with drafts of what follows, and commit what was right; returns each item's streams
        [n, hc, D], [S, hc, D] those before them, and the time that it took."""
        now = time.monotonic()
        watch = Watch(self.pools.device)
        self.drafter.propose(work)
        for item in work:
            if isinstance(item.call, GenerateCall) and item.call.left == len(item.tokens) - item.drafts:
                item.call.prepare(item.tokens[1:] if item.drafts else ())
        states = [item.call.sequence.held for item in work]
        spans = [state.span(len(item.tokens)) for state, item in zip(states, work, strict=True)]
        ids = torch.tensor([token for item in work for token in item.tokens])
        previous = self.pools.streams_of([span.slot for span in spans])
        drafts = any(item.drafts for item in work)
        batch = Batch(self.pools, spans, drafts=drafts)
        back = TakeBack(batch) if drafts else None
        rows = list(self.model.forward(ids, batch).split([len(item.tokens) for item in work]))
        if back is not None:
            self.drafter.accept(work, rows, back, self.emit)
        else:
            watch.stop()
        self.drafter.settle(work, rows, previous)
        if drafts:
            watch.stop()
        for state, item in zip(states, work, strict=True):
            state.commit(len(item.tokens), rows=item.keeps_rows)
            item.call.begin(now)
        return rows, previous, watch

    # -- calls whose tokens are computed ----------------------------------------------------------------

    def _advance(self) -> None:
        """Let every call that needs no more computation act, until none does."""
        while True:
            ready = [call for call in self._heads() if not call.left and not _waits(call)]
            drawing = [call for call in ready if isinstance(call, GenerateCall)]
            scored = [call for call in ready if isinstance(call, ScoreCall)]
            for call in scored:
                self._finish(call)
            forks = [call for call in ready if isinstance(call, ForkCall)]
            for fork in forks:
                self._fork(fork)
            if drawing:
                self._draw(drawing)
            if not (scored or forks or drawing):
                return

    def _fork(self, call: ForkCall) -> None:
        source, before = call.sequence, self.pools.copied
        for number in call.children:
            child = Sequence(list(source.tokens), source.namespace)
            if source.state is not None and self.pools.free_slots:
                child.state = source.state.fork()  # the others begin from what is kept of the source
            self.sequences[number] = child
        call.copied += self.pools.copied - before
        self._finish(call)

    def _draw(self, calls: list[GenerateCall]) -> None:
        """Sample one token for each call from the streams of its last computed token."""
        live = [call for call in calls if not self._finish_if_done(call)]
        if not live:
            return
        for call in live:
            if not call.drawn_count:  # where its prompt ends, others may begin
                self.memory.keep(call.sequence)
        slots = [call.sequence.held.slot for call in live]
        logits = self.model.logits(self.pools.streams_of(slots))
        # The head of a V4 checkpoint is padded: ids the tokenizer does not define are never drawn.
        draws = [call.draw() for call in live]
        chosen = sample(logits[:, : self.tokenizer.size], draws, deterministic=self.model.deterministic)
        entries = asked_logprobs(live, chosen, logits, self.tokenizer.size)
        for call, token, entry in zip(live, chosen, entries, strict=True):
            if call.failure is not None:
                self._fail(call, call.failure)
                continue
            event = call.drawn(token, entry)
            if event is not None:
                self.emit(event)
            self._finish_if_done(call)

    def _finish_if_done(self, call: GenerateCall) -> bool:
        if call.finish_reason is None:
            return False
        event = call.flush()
        if event is not None:
            self.emit(event)
        self.scheduler.ended(call)
        self._finish(call)
        return True

    def _finish(self, call: Call) -> None:
        self.memory.keep(call.sequence, checkpoint=not isinstance(call, ScoreCall))
        self._forget(call)
        self.emit(call.done())

    def _fail(self, call: Call, error: WeftError) -> None:
        self._forget(call)
        self.emit(m.Failed.of(call.id, error))

    def _forget(self, call: Call) -> None:
        """Tokens appended behind it join the history, or wait for the call before it if that still runs."""
        del self.calls[call.id]
        sequence = call.sequence
        place = sequence.calls.index(call)
        del sequence.calls[place]
        (sequence.calls[place - 1] if place else sequence).append(call.then_extend, call.then_cuts)


def _waits(call: Call) -> bool:
    return isinstance(call, GenerateCall) and call.waits
