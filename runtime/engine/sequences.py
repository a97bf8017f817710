"""Sequences of a core, and the KV they hold: how they get it, what is kept of it, how it is let go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from weft.runtime.cache.checkpoints import Checkpoint
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.prefix import PrefixCache
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.engine import messages as m

if TYPE_CHECKING:
    from weft.runtime.engine.calls import Call

# In a long prefill raw state is kept at this many tokens, and each time the number has doubled.
_FIRST_POINT = 512
# For near misses it is kept at multiples of this many tokens, the last two before what is computed ends. In a
# prefill that takes a step of its own, so only where so much is at stake.
_NEAR, _NEAR_WORTH = 16, 256


class Sequence:
    """A history and, once something was computed, its KV state. Calls run one after another.

    cuts: lengths at which raw state is to be kept, because the history may be continued otherwise from there.
    """

    def __init__(self, tokens: list[int], namespace: str = "", cuts: Iterable[int] = ()) -> None:
        self.tokens = tokens
        self.namespace = namespace
        self.cuts = set(cuts)
        self.pinned = 0.0  # until then, its KV goes after that of others
        self.state: SequenceState | None = None
        self.near: list[Checkpoint] = []  # kept on the way, not known to others yet
        self.calls: list[Call] = []

    @property
    def computed(self) -> int:
        """Tokens that need not be run again; while a state is brought back, fewer than it will have."""
        return self.state.length if self.state is not None else 0

    @property
    def fixed(self) -> int:
        """Tokens that the KV at hand belongs to: the history cannot lose these."""
        return max(self.state.length, self.state.chain) if self.state is not None else 0

    @property
    def held(self) -> SequenceState:
        """Its state, which it must have."""
        assert self.state is not None
        return self.state

    def next_cut(self) -> int:
        """Tokens until the next length at which state is to be kept; none is while it is brought back."""
        near = (len(self.tokens) - _NEAR) // _NEAR * _NEAR
        cuts = [*self.cuts, _point(self.fixed + 1)]
        if near - self.fixed >= _NEAR_WORTH:
            cuts.append(near)
        return min(cut for cut in cuts if cut > self.fixed) - self.computed

    def append(self, tokens: list[int], cuts: Iterable[int]) -> None:
        """cuts: within the tokens."""
        self.cuts.update(len(self.tokens) + cut for cut in cuts)
        self.tokens.extend(tokens)


class Memory:
    """Owns the prefix cache. Every state of a sequence begins and ends here."""

    def __init__(self, pools: Pools, *, mtp: bool = False) -> None:
        """mtp: the rows of the MTP block are kept too."""
        self.pools = pools
        self.prefix = PrefixCache(pools, mtp=mtp)

    def explain(self, tokens: list[int], namespace: str) -> m.Explained:
        """What `begin` would do for such a history, and where it parts from the nearest one known."""
        plan = self.prefix.plan(tokens, namespace)
        others = self.prefix.others(tokens, namespace)
        return m.Explained(
            way=plan.way,
            matched=plan.matched,
            cached=plan.start,
            replayed=plan.replayed,
            computed=plan.tokens - plan.start,
            copied=self.pools.raw_bytes if plan.way == "checkpoint" else 0,
            reason=plan.reason,
            differs=tokens[plan.matched] if others else None,
            others=others,
        )

    def stats(self, calls: int) -> m.Stats:
        pages = [own for kind, own in self.pools.allocators.items() if kind != "window"]
        total = sum(own.total for own in pages)
        slots = self.pools.sizes.slots
        return m.Stats(
            calls=calls,
            slots=slots - self.pools.free_slots,
            slots_in_all=slots,
            usage=1 - sum(own.free for own in pages) / total,
        )

    def begin(self, call: Call) -> bool:
        """Give the call's sequence a state, as far on as is known; False if there is no slot."""
        if not self.pools.free_slots:
            return False
        sequence, before = call.sequence, self.pools.copied
        wanted = sequence.tokens[: call.known_limit()]
        sequence.state, plan = self.prefix.resume(wanted, sequence.namespace)
        call.resumed(plan, self.pools.copied - before)
        return True

    def reserve(self, call: Call, count: int) -> bool:
        """Make `count` more tokens of the call writable; what was used least is let go for it."""
        state, before = call.sequence.held, self.pools.copied
        if not self.prefix.make_room(state, count):
            return False
        state.reserve(count)
        call.copied += self.pools.copied - before
        return True

    def keep(self, sequence: Sequence, *, checkpoint: bool = True) -> None:
        """Know what the sequence has computed; with a checkpoint, histories that continue it need compute nothing
        of it."""
        if sequence.state is not None:
            near, sequence.near = sequence.near, []
            own = sequence.tokens, sequence.state, sequence.namespace
            self.prefix.keep(*own, checkpoint=checkpoint, near=near)

    def passed(self, sequence: Sequence, count: int) -> None:
        """The last `count` tokens of it were computed: keep the state if this is a place for it. A step with
        drafts may pass one by; then where it ends is as good."""
        length = sequence.computed
        if length in sequence.cuts or _point(length - count + 1) <= length:
            self.keep(sequence)
        elif length % _NEAR < count and len(sequence.tokens) - length < 2 * _NEAR:
            kept = self.prefix.keep_near(sequence.held)
            sequence.near += [kept] if kept is not None else []
            if len(sequence.near) > 2:
                self.prefix.forget(sequence.near.pop(0))

    def let_go(self, sequence: Sequence, *, checkpoint: bool) -> None:
        """Give back its state; what is known of it stays as long as nobody needs the room."""
        if sequence.state is not None:
            self.keep(sequence, checkpoint=checkpoint)
            sequence.state.close()
            sequence.state = None


def _point(length: int) -> int:
    """The first of 512, 1,024, 2,048 ... that is at least `length`."""
    return _FIRST_POINT << ((length - 1) // _FIRST_POINT).bit_length()
