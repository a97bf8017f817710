"""What is known of earlier sequences, and how a new one begins: the tree of chains, checkpoints at its cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from weft.runtime.cache.base import replay_start
from weft.runtime.cache.checkpoints import Checkpoint, Checkpoints
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.radix import CHAIN_KINDS, Match, RadixTree, Tokens, as_tokens
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import ModelConfig

Way = Literal["cold", "checkpoint", "replay"]
# Why no more than the matched tokens, or more than none of them, need not be computed.
Reason = Literal["", "no_tokens", "no_checkpoint", "chain_evicted"]


@dataclass(frozen=True)
class Plan:
    """How a sequence begins. tokens: all it has. matched: how many of them are known. way, start: from where it
    computes. work: token rows to compute until all of them are, a replay's rows by the share of layers they take.
    reason: why it is not fewer."""

    tokens: int
    matched: int
    way: Way
    start: int
    work: float
    reason: Reason

    @property
    def replayed(self) -> int:
        """Known tokens that are computed again, to the same bits."""
        return self.matched - self.start


class PrefixCache:
    """Owns a tree and its checkpoints over the pools' pages; `make_room` gives them up to who computes."""

    def __init__(self, pools: Pools, *, mtp: bool = False) -> None:
        """mtp: a replay brings the rows of the MTP block back too."""
        self._pools = pools
        self._mtp = mtp
        self.checkpoints = Checkpoints(pools)
        self.tree = RadixTree(pools.allocators, pools.sizes.page, self._forget)
        self._loose: set[Checkpoint] = set()

    # -- beginning --------------------------------------------------------------------------------------

    def plan(self, tokens: Sequence[int], namespace: str = "") -> Plan:
        """What `resume` would do, without a trace."""
        known = as_tokens(tokens)
        return self._plan(known, self.tree.look(known, namespace))[0]

    def others(self, tokens: Sequence[int], namespace: str = "", most: int = 8) -> list[int]:
        """Known tokens, if any, in place of the first one of `tokens` that is not known."""
        known = as_tokens(tokens)
        node, length = self.tree.look(known, namespace)
        if length == len(known):
            return []
        if length < node.end:
            return [int(node.label[length - node.start])]
        return sorted(node.children)[:most]

    def resume(self, tokens: Sequence[int], namespace: str = "") -> tuple[SequenceState, Plan]:
        """A state that is about to compute what is not known of `tokens`. Ask `pools.free_slots` first."""
        known = as_tokens(tokens)
        found = self.tree.match(known, namespace)
        plan, checkpoint = self._plan(known, found)
        state = SequenceState(self._pools)
        if plan.way != "cold":
            state.adopt(self.tree.pages(found), plan.matched)
        if checkpoint is not None:
            self.checkpoints.restore(checkpoint, state)
        elif plan.way == "replay":
            state.begin_replay(plan.start)
        return state, plan

    def _plan(self, known: Tokens, found: Match) -> tuple[Plan, Checkpoint | None]:
        """The cheapest way, and the checkpoint if that is one."""
        total, matched = len(known), found.length
        reason: Reason = ""
        if matched < total:
            reason = "chain_evicted" if self.tree.was_let_go(found, known) else "no_tokens"
        if not matched:
            return Plan(total, 0, "cold", 0, total, reason), None
        best = max(self._marks(found), key=lambda checkpoint: checkpoint.cut, default=None)
        start = replay_start(self._pools.config, matched, mtp=self._mtp)
        work = replay_work(self._pools.config, start, matched) + total - matched
        if best is not None and total - best.cut <= work:
            if best.cut < matched:
                reason = "no_checkpoint"
            return Plan(total, matched, "checkpoint", best.cut, total - best.cut, reason), best
        return Plan(total, matched, "replay", start, work, "no_checkpoint"), None

    # -- remembering ------------------------------------------------------------------------------------

    def keep(
        self,
        tokens: Sequence[int],
        state: SequenceState,
        namespace: str = "",
        *,
        checkpoint: bool = True,
        near: Iterable[Checkpoint] = (),
    ) -> None:
        """Know what `state` has computed of `tokens`, its own; with a checkpoint also its raw state. near: of the
        same sequence, from `keep_near`; they are the cache's again. The state goes on as before."""
        if state.behind or not state.length:
            assert not near, "they were kept by a state that had computed"
            return
        known = as_tokens(tokens[: state.length])
        node, _ = self.tree.insert(known, state.pages, namespace)
        found = Match(node, state.length)
        for loose in near:
            self._mark(found, loose)
        mark: Checkpoint | None = node.marks.get(state.length)
        if not checkpoint or (mark is not None and not mark.dropped):
            return
        saved = self.checkpoints.save(state, self._saves(found, state.length))
        if saved is not None:
            node.marks[state.length] = saved

    def keep_near(self, state: SequenceState) -> Checkpoint | None:
        """Its raw state as it is now, for histories that will part from this one soon behind it. The caller's,
        until it is given to `keep` or to `forget`."""
        saved = None if state.behind else self.checkpoints.save(state, 0, near=True)
        if saved is not None:
            self._loose.add(saved)
        return saved

    def forget(self, loose: Checkpoint) -> None:
        """Give back what `keep_near` has kept."""
        self._loose.discard(loose)
        self._forget(loose)

    def _mark(self, found: Match, loose: Checkpoint) -> None:
        """Put it where it belongs on the path of a match, unless there is one already."""
        node = next(node for node in found.node.path() if loose.cut <= node.end)
        mark: Checkpoint | None = node.marks.get(loose.cut)
        if loose.dropped or (mark is not None and not mark.dropped):
            self.forget(loose)
            return
        loose.saves = self._saves(found, loose.cut)
        node.marks[loose.cut] = loose
        self._loose.discard(loose)

    def _saves(self, found: Match, cut: int) -> int:
        """Tokens to compute if there is no checkpoint at the cut."""
        before = max((mark.cut for mark in self._marks(found) if mark.cut < cut and not mark.near), default=0)
        start = replay_start(self._pools.config, cut, mtp=self._mtp)
        return min(cut - before, round(replay_work(self._pools.config, start, cut)))

    def _marks(self, found: Match) -> list[Checkpoint]:
        """The checkpoints at cuts of a match."""
        marks = (mark for node in found.node.path() for mark in node.marks.values())
        return [mark for mark in marks if mark.cut <= found.length and not mark.dropped]

    def _forget(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.dropped:
            self.checkpoints.drop(checkpoint)

    # -- letting go -------------------------------------------------------------------------------------

    def make_room(self, state: SequenceState, count: int) -> bool:
        """Let go of what was used least until `count` more tokens of `state` fit; False if they never will."""
        for kind in CHAIN_KINDS:
            self.tree.evict(kind, state.needs(kind, count))
        window = self._pools.allocators["window"]
        while not window.can_alloc(state.needs("window", count)) and self.checkpoints.held:
            self.checkpoints.drop(self.checkpoints.least())
        # What the state shares with the tree alone it need not copy once the tree has let go of it.
        while not state.can_reserve(count) and self.tree.drop_oldest():
            pass
        return state.can_reserve(count)

    def clear(self) -> None:
        """Let go of everything."""
        while self.tree.drop_oldest():
            pass
        assert self._loose.issuperset(self.checkpoints.held), "a checkpoint is a mark of the tree"

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        self.tree.check()
        self.checkpoints.check()
        marks = {mark for node in self.tree.nodes() for mark in node.marks.values() if not mark.dropped}
        loose = {checkpoint for checkpoint in self._loose if not checkpoint.dropped}
        assert not marks & loose and marks | loose == set(self.checkpoints.held)


def replay_work(config: ModelConfig, start: int, cut: int) -> float:
    """Rows that a replay computes, in rows of all layers: layer l leaves out those before start + (W-1) l."""
    reach = config.sliding_window - 1
    layers = config.num_hidden_layers
    skipped = [min(reach * layer, cut - start) if start else 0 for layer in range(layers)]
    return cut - start - sum(skipped) / layers
