"""A sequence, and others that take its chain and replay their raw state behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from support.cuts import tokens_of
from support.run import pools_for, step
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.model import Model

AFTER = 40  # tokens computed behind a cut, to see that its state is right


class Scene:
    """A cold sequence of `length` tokens whose chain others take."""

    def __init__(self, model: Model, length: int, page: int = 16) -> None:
        self.model = model
        self.tokens = tokens_of(length)
        self.pools: Pools = pools_for(model, [self.tokens] * 3, page)
        self.first = SequenceState(self.pools)
        step(model, [(self.first, self.tokens)])

    def behind(self, cut: int, start: int) -> SequenceState:
        """A state that has the chain of `cut` tokens and replays from `start`."""
        state = SequenceState(self.pools)
        size = self.pools.sizes.page
        pages = {
            kind: {n: self.first.pages[kind][n] for n in range(-(-(cut // ratio) // size))}
            for kind, ratio in (("c4", 4), ("c128", 128))
        }
        state.adopt(pages, cut)
        state.begin_replay(start)
        return state

    def replay(self, state: SequenceState, chunk: int = 1 << 20) -> None:
        while state.behind:
            count = min(chunk, state.behind)
            step(self.model, [(state, self.tokens[state.length : state.length + count])])

    def logits_after(self, state: SequenceState, count: int = AFTER) -> Tensor:
        """Logits of the cut's last token, and of the tokens behind it in pieces of several sizes."""
        streams = [self.pools.streams[state.slot : state.slot + 1].clone()]
        for size in (1, 3, count - 4):
            part = self.tokens[state.length : state.length + size]
            if part:
                streams += step(self.model, [(state, part)])
        return self.model.logits(torch.cat(streams))

    def poison(self) -> None:
        """What was never written, or is not this sequence's, reads as NaN from now on; but not the null row, which
        stands for keys that there are not."""
        held = set(self.first.pages["window"].values())
        size = self.pools.sizes.page
        for rows in self.pools.kv:
            for page in range(self.pools.sizes.pages("window", self.model.config.sliding_window)):
                if page not in held:
                    rows.tensor[max(page * size, 1) : (page + 1) * size] = torch.nan
        free = [slot for slot in range(self.pools.sizes.slots) if slot != self.first.slot]
        for tensor in (self.pools.c4_tail, self.pools.c128_fold):
            tensor[:, free] = torch.nan
