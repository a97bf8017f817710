"""Messages between an engine's front and its core.

Plain data only, no tensors: the same messages serve a core in a thread and one in a process (as msgpack).
Sequence and call ids are chosen by the front. Calls on one sequence run in the order they were sent. Deadlines
and `sent` are points of the monotonic clock.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.errors import RequestError, WeftError

# -- front to core ----------------------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True, tag=True):
    """Create sequence `sequence` with this history. cuts: lengths at which other histories may part from it.
    namespace: what it computes is found from the same namespace only."""

    sequence: int
    tokens: list[int]
    cuts: list[int] = []
    namespace: str = ""


class Extend(msgspec.Struct, frozen=True, tag=True):
    """Append tokens; they are computed when a later call needs them. cuts: within them, 0 to their number."""

    sequence: int
    tokens: list[int]
    cuts: list[int] = []


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Until then, take the sequence's KV after that of others without calls."""

    sequence: int
    until: float


class Truncate(msgspec.Struct, frozen=True, tag=True):
    """Drop tokens from the end, back to `length`; only tokens not computed yet can go."""

    call: int
    sequence: int
    length: int


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Compute the whole history once, then create `children` sharing it."""

    call: int
    sequence: int
    children: list[int]
    deadline: float | None = None
    sent: float = msgspec.field(default_factory=time.monotonic)


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Sample tokens; they become part of the sequence's history. `params.seed` is set."""

    call: int
    sequence: int
    params: SamplingParams
    deadline: float | None = None
    sent: float = msgspec.field(default_factory=time.monotonic)


class Score(msgspec.Struct, frozen=True, tag=True):
    """Append tokens and report the log-probability of each, with `top` alternatives."""

    call: int
    sequence: int
    tokens: list[int]
    top: int = 0
    deadline: float | None = None
    sent: float = msgspec.field(default_factory=time.monotonic)


class Explain(msgspec.Struct, frozen=True, tag=True):
    """Say how a history would begin now; nothing is changed."""

    call: int
    tokens: list[int]
    namespace: str = ""


class Look(msgspec.Struct, frozen=True, tag=True):
    """Say how full the core is."""

    call: int


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Forget what is known of histories that are not open."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a call now, wherever it is; the sequence keeps the tokens it has."""

    call: int


class Close(msgspec.Struct, frozen=True, tag=True):
    """Forget a sequence and free its state; its calls end as cancelled."""

    sequence: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the core."""


Call = Truncate | Fork | Generate | Score | Explain | Look  # ends with `Done` or `Failed`
Request = Open | Extend | Pin | Flush | Call | Cancel | Close | Stop

# -- core to front ----------------------------------------------------------------------------------------


class Logprob(msgspec.Struct, frozen=True):
    """One token's log-probability; `top` lists (token, logprob) of the best alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a call took. Counts are tokens, times seconds.

    history: tokens before the call's own. cached: of those, not run for it: its sequence had computed them, or
    their state was kept. matched: tokens known when the sequence took up its KV, replayed: those of them run again
    to bring raw state back, reason: why not all were cached (`cache.prefix.Reason`); 0 and empty if the sequence
    had its KV. computed: tokens run through the model for it, those replayed too. copied: bytes of KV copied.
    drafted: tokens that were guessed and run before it was known that they were right, accepted: those that were;
    the others are not among those computed. first_token: from submission to the first token.
    """

    history: int = 0
    cached: int = 0
    matched: int = 0
    replayed: int = 0
    computed: int = 0
    copied: int = 0
    reason: str = ""
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """How a history would begin (`cache.prefix.Plan`).

    way: cold, checkpoint or replay. cached: tokens that would not be run. matched: known ones; replayed: those
    of them to run again, computed: all to run. differs: the first token that is not known, if others are known
    at its place: those (some of them) are `others`. copied: bytes of KV to copy. reason: why not all is cached.
    """

    way: str
    matched: int
    cached: int
    replayed: int
    computed: int
    copied: int
    reason: str
    differs: int | None = None
    others: list[int] = []


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """How full a core is. calls: under way; slots: of sequences with KV, of `slots_in_all`. usage: of the pages of
    entries, the share that is taken, by what nobody has open too."""

    calls: int
    slots: int
    slots_in_all: int
    usage: float


class Loading(msgspec.Struct, frozen=True, tag=True):
    """A core's process reads its checkpoint: so many bytes of so many, now of this shard."""

    done: int
    total: int
    shard: str


class Delta(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """New tokens of a generation. `text` never holds half a character nor part of a stop."""

    call: int
    tokens: list[int]
    text: str
    logprobs: list[Logprob] = []


class Done(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A call ended well. finish_reason: stop, length or empty for calls that generate nothing.

    stop: what ended it (a stop string, or a token id). kept: generated tokens that lie wholly in the returned
    text: a stop cuts off those behind. length: tokens in the sequence's history now.
    """

    call: int
    usage: Usage
    length: int
    finish_reason: str = ""
    stop: str | int | None = None
    kept: int = 0
    logprobs: list[Logprob] = []
    explained: Explained | None = None
    stats: Stats | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A call ended with an error: `kind` names a class in `weft.runtime.errors`; request errors have a field."""

    call: int
    kind: str
    reason: str
    field: str = ""
    value: Any = None

    @classmethod
    def of(cls, call: int, error: WeftError) -> Failed:
        kind = type(error).__name__
        if isinstance(error, RequestError):
            return cls(call, kind, error.reason, error.field, error.value)
        return cls(call, kind, str(error))


Answer = Delta | Done | Failed  # of a call
Event = Answer | Loading
