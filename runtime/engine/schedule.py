"""Which tokens run in a step, and who gives way when memory is short."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from weft.runtime.cache.radix import as_tokens, common_prefix
from weft.runtime.engine.admission import Admission, Usual
from weft.runtime.engine.calls import Call, GenerateCall
from weft.runtime.engine.pace import Drafting
from weft.runtime.engine.sequences import Memory, Sequence
from weft.runtime.engine.watch import Watch

_PATIENCE = 16  # times that a call is passed over by younger ones whose prefix is known
_MOST_CERTAIN = 7  # drafts of a grammar in one step; the compressors' raw state can take back so many
_WORTH_WAITING = 64  # tokens that another call is about to compute too


@dataclass
class Work:
    """Tokens of one call to run in this step. drafts: how many of the last ones are, or will be, drafts. guessed:
    by the MTP block, not by a grammar. keeps_rows: the MTP block's rows of these tokens are kept. odds: [V], in
    fast mode, that each guess was drawn with."""

    call: Call
    tokens: list[int]
    drafts: int = 0
    guessed: bool = False
    keeps_rows: bool = False
    odds: list[Tensor] = field(default_factory=list)

    @property
    def generating(self) -> GenerateCall:
        """The call, which drafts."""
        assert isinstance(self.call, GenerateCall)
        return self.call


class Scheduler:
    """Continuous batching: decodes, one token each, then prefill chunks up to a budget."""

    def __init__(self, memory: Memory, chunk: int, drafts: int, *, certain: bool) -> None:
        """drafts: tokens that the MTP block may guess for a decoding call per step.
        certain: what grammars leave no choice about is drafted."""
        self._memory = memory
        self._chunk = chunk
        self.drafting = Drafting(drafts)
        self._most_certain = _MOST_CERTAIN if certain else 0
        self.usual = Usual()
        self.preempted = 0  # calls that gave way so far

    def begin(self, active: list[Call]) -> None:
        """Give states to calls that have none and fit. While an older fork waits for slots, none goes to a younger
        call; while another call computes the beginning of a history, the history waits for it."""
        blocked = min((call.id for call in active if not call.left), default=sys.maxsize)
        waiting = [call for call in active if call.sequence.state is None and call.left]
        if not waiting or not self._memory.pools.free_slots:
            return
        running = [call for call in active if call.sequence.state is not None]
        room = Admission(self._memory, running, self.usual)
        for call in self._in_order([call for call in waiting if call.id < blocked]):
            if self._shares(call, active):
                continue
            if not room.admits(call) or not self._memory.begin(call):
                return

    def _in_order(self, waiting: list[Call]) -> list[Call]:
        """The oldest first; if not all can have a slot, those whose prefix is known longest, up to a point."""
        if len(waiting) <= self._memory.pools.free_slots:
            return waiting
        known = {c.id: self._known(c) for c in waiting}
        order = sorted(waiting, key=lambda c: (c.passed_over < _PATIENCE and -known[c.id], c.id))
        for call in waiting[:1]:
            call.passed_over += order[0] is not call
        return order

    def _shares(self, call: Call, active: list[Call]) -> bool:
        """Whether a call under way will soon have computed more of this history than is known; it is told to keep
        its state where the two part."""
        own = call.sequence
        tokens = as_tokens(own.tokens[: call.known_limit()])
        for other in active:
            theirs = other.sequence
            if theirs.state is None or theirs.namespace != own.namespace:
                continue
            if other.left <= 1 or len(tokens) <= theirs.computed or theirs.tokens[0] != own.tokens[0]:
                continue  # it decodes, has passed what they could share, or shares nothing
            shared = common_prefix(as_tokens(theirs.tokens[: len(tokens)]), tokens)
            if shared > theirs.computed and shared >= self._known(call) + _WORTH_WAITING:
                theirs.cuts.add(shared)
                return True
        return False

    def _known(self, call: Call) -> int:
        """Tokens of the call's history that are known."""
        sequence = call.sequence
        return self._memory.prefix.plan(sequence.tokens[: call.known_limit()], sequence.namespace).matched

    def work(self, active: list[Call]) -> list[Work]:
        """What runs now; the rows of it are reserved. Oldest calls first; decodes cost one token each, so they
        come before prefill."""
        work: list[Work] = []
        budget = self._chunk
        decoding = [call for call in active if call.left == 1 and call.sequence.state is not None]
        wants = self._to_draft(decoding)
        plain = self.drafting.most > 0 and self.drafting.explores(len(decoding))
        for call in sorted(active, key=lambda call: call.left > 1):
            left, state = call.left, call.sequence.state
            if not left or state is None:
                continue
            count = 1 if left == 1 else min(left, budget, call.sequence.next_cut(), state.behind or left)
            if count == 0:
                continue
            wanted = wants.get(call.id, 0)
            certain = self._certain(call) if left == 1 else []
            drafts = len(certain) or (0 if plain else self._may_draft(call, wanted))
            if not self._memory.reserve(call, count + drafts):
                if not call.has_run:
                    self._memory.let_go(call.sequence, checkpoint=False)  # do not sit on a slot
                continue
            start = call.sequence.computed
            tokens = call.sequence.tokens[start : start + count] + certain
            draws = left == 1 and isinstance(call, GenerateCall)
            keeps = self.drafting.most > 0 and (wanted > 0 or not draws)
            work.append(Work(call, tokens, drafts, bool(drafts and not certain), keeps))
            if left > 1:
                budget -= count
        return work

    def _to_draft(self, decoding: list[Call]) -> dict[int, int]:
        """By call, how many tokens behind its next one it pays to draft; none if too few calls would."""
        if not self.drafting.most:
            return {}
        cost, gain, wants = self.drafting.cost(len(decoding)), 0.0, {}
        for call in decoding:
            if isinstance(call, GenerateCall):
                if call.pace is None:
                    call.pace = self.drafting.pace()
                wants[call.id] = call.pace.drafts(self.drafting.most, cost)
                gain += call.pace.gain(wants[call.id])
        # Half of what drafts cost is for the first of a step.
        return wants if gain > cost * (len(decoding) + sum(wants.values())) / 2 else {}

    def _may_draft(self, call: Call, wanted: int) -> int:
        """How many of them now: none before the first token is drawn, nor where others would have to give way."""
        if not wanted or not isinstance(call, GenerateCall) or not call.drawn_count:
            return 0
        return self._room(call, wanted) if call.sequence.held.can_draft else 0

    def _certain(self, call: Call) -> list[int]:
        """Tokens that a grammar leaves no choice about, as far as there is room for them."""
        if not isinstance(call, GenerateCall) or not call.drawn_count or call.sequence.held.behind:
            return []
        certain = call.certain(self._most_certain) if self._most_certain else []
        return certain[: self._room(call, len(certain))]

    def _room(self, call: GenerateCall, wanted: int) -> int:
        """How many of so many drafts it may have: not more than it may draw, nor than fit now."""
        wanted = min(wanted, call.params.max_tokens - call.drawn_count - 1)
        while wanted > 0 and not call.sequence.held.can_reserve(1 + wanted):
            wanted -= 1
        return max(wanted, 0)

    def took(self, work: list[Work], watch: Watch) -> None:
        """The step of this work took so long, what keeps rows for later drafts left out."""
        if self.drafting.most and all(item.guessed or len(item.tokens) == 1 for item in work):
            self.drafting.took(len(work), sum(item.drafts for item in work), watch.seconds)

    def ended(self, call: GenerateCall) -> None:
        """It has drawn all its tokens."""
        self.usual.add(call.drawn_count)
        if call.pace is not None:
            self.drafting.ended(call.pace)

    def take_memory(self, active: list[Call], sequences: Iterable[Sequence]) -> list[Call] | None:
        """Free the KV of a sequence without calls, else of the youngest call that holds any beside the oldest.

        The sequence keeps its tokens; its state is kept too, as long as there is room, and otherwise computed
        again, to the same bits, when it has a call whose turn has come. Returns the calls that this is for: the
        victim would only fill it again. None if nothing is left to take.
        """
        now = time.monotonic()
        idle = [s for s in sequences if s.state is not None and not s.calls]
        idle.sort(key=lambda sequence: sequence.pinned > now)
        holders = [call.sequence for call in active if call.sequence.state is not None]
        younger = [sequence for sequence in holders if sequence is not active[0].sequence]
        chosen = idle[0] if idle else younger[-1] if younger else None
        if chosen is None:
            # States that had just begun are gone again, and may have held what the oldest call needs.
            return active[:1] if len(active) > 1 else None
        self._memory.let_go(chosen, checkpoint=True)
        self.preempted += bool(chosen.calls)
        return active[: active.index(chosen.calls[0])] if chosen.calls else active
