"""Any order of messages and steps, in memory too small for it, gives what each call gives alone, cold and unpaged.

The machine drives a core as its host does; `support.book` says what has to come of it. Between steps memory that
nobody holds is filled with NaN, and every page and slot has to be held by the right number of sequences.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from support.book import Book
from support.engine import draft_always, some_tokens
from weft.runtime.decoding.params import SamplingParams

CONTEXT, QUEUE, OPEN = 160, 10, 7
LENGTHS = st.integers(1, 5) | st.sampled_from((15, 16, 17, 127, 128, 129)) | st.integers(1, 140)
PICK = st.integers(0, 1 << 16)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 12) | st.just(30),
    temperature=st.sampled_from((0.0, 0.8, 1.3)),
    seed=st.integers(0, 3),
    top_p=st.sampled_from((1.0, 0.9)),
    presence_penalty=st.sampled_from((0.0, 0.5)),
    repetition_penalty=st.sampled_from((1.0, 1.2)),
    logprobs=st.sampled_from((None, 0, 2)),
    stop_token_ids=st.sampled_from(((), tuple(range(3, 40)))),
    ignore_eos=st.booleans(),
)
LONG = SamplingParams(max_tokens=CONTEXT // 4, seed=1, ignore_eos=True)


class Messages(RuleBasedStateMachine):
    @initialize(
        page=st.integers(1, 64) | st.sampled_from((1, 2, 3, 4, 6, 8)),
        slots=st.integers(3, 5),
        chunk=st.integers(12, 64),
        spare=st.integers(-2, 4),
        checkpoints=st.integers(0, 6),
        drafts=st.integers(0, 4),
    )
    def start(self, page: int, slots: int, chunk: int, spare: int, checkpoints: int, drafts: int) -> None:
        self.book = Book(page, slots, chunk, spare, CONTEXT, QUEUE, checkpoints, drafts)

    def pick(self, number: int) -> int:
        return list(self.book.open)[number % len(self.book.open)]

    def pick_call(self, number: int) -> int:
        return list(self.book.calls)[number % len(self.book.calls)]

    # -- single messages --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.book.open) < OPEN)
    @rule(count=st.just(0) | LENGTHS, seed=PICK)
    def begin(self, count: int, seed: int) -> None:
        self.book.begin(some_tokens(count, seed))

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, count=LENGTHS, seed=PICK)
    def extend(self, number: int, count: int, seed: int) -> None:
        self.book.extend(self.pick(number), some_tokens(count, seed))

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, params=PARAMS)
    def generate(self, number: int, params: SamplingParams) -> None:
        self.book.generate(self.pick(number), params)

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, count=LENGTHS, seed=PICK, top=st.integers(0, 2))
    def score(self, number: int, count: int, seed: int, top: int) -> None:
        self.book.score(self.pick(number), some_tokens(count, seed), top)

    @precondition(lambda self: 0 < len(self.book.open) < OPEN)
    @rule(number=PICK, count=st.integers(1, 3))
    def fork(self, number: int, count: int) -> None:
        self.book.fork(self.pick(number), count)

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, back=st.integers(-1, 20))
    def truncate(self, number: int, back: int) -> None:
        self.book.truncate(self.pick(number), back)

    @precondition(lambda self: self.book.calls)
    @rule(number=PICK, expire=st.booleans())
    def end_early(self, number: int, expire: bool) -> None:
        (self.book.expire if expire else self.book.cancel)(self.pick_call(number))

    @precondition(lambda self: self.book.open)
    @rule(number=PICK)
    def close(self, number: int) -> None:
        self.book.close(self.pick(number))

    # -- steps ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.book.calls)
    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.book.step()

    @precondition(lambda self: self.book.calls)
    @rule()
    def settle(self) -> None:
        self.book.settle()

    # -- what single messages rarely add up to ----------------------------------------------------------

    @rule(length=LENGTHS, number=PICK, params=PARAMS, tails=st.tuples(*[st.sampled_from((0, 0, 1, 4, 9))] * 3))
    def family(self, length: int, number: int, params: SamplingParams, tails: tuple[int, ...]) -> None:
        """A fork, after which the parent and both children go on, each its own way."""
        room = self.book.open and len(self.book.open) < OPEN
        parent = self.pick(number) if room else self.book.begin(some_tokens(length, number))
        children = self.book.fork(parent, 2)
        self.book.settle()
        for i, id in enumerate(id for id in (*children, parent) if id in self.book.open):
            self.book.extend(id, some_tokens(tails[i], i))
            self.book.generate(id, msgspec.structs.replace(params, seed=i))

    @precondition(lambda self: len(self.book.open) < 3)
    @rule(counts=st.lists(st.integers(40, 120), min_size=2, max_size=4), score=st.booleans())
    def crowd(self, counts: list[int], score: bool) -> None:
        """Several that need nearly all of the memory: all draw, or the eldest does while the others score."""
        for i, count in enumerate(counts):
            if score and i:
                self.book.score(self.book.begin(some_tokens(2, i)), some_tokens(count, i), 1)
            else:
                self.book.generate(self.book.begin(some_tokens(count, i)), LONG)

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, params=PARAMS, steps=st.integers(0, 5), expire=st.booleans())
    def row(self, number: int, params: SamplingParams, steps: int, expire: bool) -> None:
        """Calls on one sequence with tokens appended behind each, and one of them ends early."""
        id = self.pick(number)
        for i in range(3):
            self.book.generate(id, params)
            self.book.extend(id, some_tokens(2, i))
        for _ in range(steps):
            self.book.step()
        if calls := self.book.open[id].calls:
            (self.book.expire if expire else self.book.cancel)(calls[number % len(calls)].message.call)

    @precondition(lambda self: self.book.open)
    @rule(number=PICK, over=st.integers(-1, 1), draw=st.booleans())
    def up_to_the_context(self, number: int, over: int, draw: bool) -> None:
        self.book.settle()
        id = self.pick(number)
        tokens = self.book.open[id].tokens
        count = CONTEXT + over - len(tokens)
        if draw and tokens and 0 <= count <= 40:
            self.book.generate(id, SamplingParams(max_tokens=count, seed=1, ignore_eos=True))
        elif not draw and count > 0:
            self.book.score(id, some_tokens(count, number), 0)

    def teardown(self) -> None:
        if hasattr(self, "book"):
            self.book.finish()


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_messages(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 110 messages and steps each. Calls go on drafting however wrong they are."""
    draft_always(monkeypatch)
    skipped = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Messages, settings=settings(max_examples=examples, stateful_step_count=20, suppress_health_check=skipped)
    )
