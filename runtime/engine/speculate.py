"""Drafting with the MTP block: several tokens of a call in one step, and the same ones as without.

Before a step, the block says what is likely to follow a call's last token; the step computes these drafts with it.
Then tokens are drawn row by row, as they would be alone, while the next row's token is what was drawn. The rest is
taken back (`model.verify`). The noise of a draw depends on its position only, so drafts change no token, only how
many steps they take. A model that is not deterministic anyway accepts more of them, by rejection sampling: then
drafts change tokens, but not what they are likely to be (`decoding.rejection`).

The block's window rows are kept as tokens are computed, from true streams and tokens; rows that drafts have
written behind those are written again. A call whose drafts are mostly wrong stops drafting, and its rows are not
kept then: later calls on the history begin with a gap and may draft worse, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from weft.runtime.cache.base import Span
from weft.runtime.decoding.noise import DRAFT
from weft.runtime.decoding.rejection import guess, judge
from weft.runtime.decoding.sampler import Draw, sample
from weft.runtime.engine import messages as m
from weft.runtime.engine.calls import GenerateCall, asked_logprobs
from weft.runtime.engine.schedule import Work
from weft.runtime.model.base import Network
from weft.runtime.model.batch import Batch
from weft.runtime.model.verify import TakeBack


class Drafter:
    """Owns nothing: reads and writes the pools of the states it is given."""

    def __init__(self, model: Network, defined: int) -> None:
        """defined: ids from this one on are never drawn."""
        self._model = model
        self._defined = defined

    def propose(self, work: Sequence[Work]) -> None:
        """Append to the tokens of each item as many drafts as it asks for; their rows are reserved."""
        asking = [(item, item.generating) for item in work if item.guessed]
        if not asking:
            return
        pools = asking[0][0].call.sequence.held.pools
        h = pools.streams_of([item.call.sequence.held.slot for item, _ in asking])
        depth = 0
        while asking:
            spans = []
            for item, call in asking:
                call.prepare(item.tokens[1:])
                state = call.sequence.held
                spans.append(Span(state.slot, state.length - 1 + depth, 1))
            ids = torch.tensor([item.tokens[-1] for item, _ in asking])
            h = self._model.forward_mtp(h, ids, Batch(pools, spans))
            logits = self._model.mtp_logits(h)[:, : self._defined]
            for (item, _), token in zip(asking, self._guess(logits, asking), strict=True):
                item.tokens.append(token)
            depth += 1
            more = [i for i, (item, _) in enumerate(asking) if item.drafts > depth]
            if len(more) < len(asking):
                asking, h = [asking[i] for i in more], h.index_select(0, pools.numbers(np.array(more)))

    def _guess(self, logits: Tensor, asking: Sequence[tuple[Work, GenerateCall]]) -> list[int]:
        draws = [call.draw(item.tokens[1:]) for item, call in asking]
        if self._model.deterministic:
            return sample(logits, draws)
        if all(draw.params.temperature == 0 for draw in draws):
            return sample(logits, draws, DRAFT)
        guesses, odds = guess(logits, draws)
        for (item, call), row in zip(asking, odds, strict=True):
            if call.params.temperature > 0:  # others are certain
                item.odds.append(row)
        return guesses

    def accept(
        self, work: Sequence[Work], rows: list[Tensor], back: TakeBack, emit: Callable[[m.Event], None]
    ) -> None:
        """Draw for as long as the drafts are right; cut items and rows to what was.

        rows: [n, hc, D] of each item. A row counts only if the drafts before it are right."""
        asking = [(number, item) for number, item in enumerate(work) if item.drafts]
        logits = self._model.logits(torch.cat([rows[number][:-1] for number, _ in asking]))
        draws = [item.generating.draw(item.tokens[1 : 1 + i]) for _, item in asking for i in range(item.drafts)]
        drawn = iter(self._draw(logits[:, : self._defined], draws, [item for _, item in asking]))
        for (number, item), part in zip(asking, logits.split([item.drafts for _, item in asking]), strict=True):
            right = self._right(item, [next(drawn) for _ in part], part, emit)
            kept = 1 + right - (item.generating.finish_reason is not None)
            warm = item.generating.params.temperature > 0
            if warm and not self._model.deterministic and right < kept <= item.drafts:
                item.generating.refused = self._odds(item, right, logits.device)
            back.keep(number, kept, rows[number])
            rows[number], item.tokens = rows[number][:kept], item.tokens[:kept]
        back.apply()

    def _draw(self, logits: Tensor, draws: list[Draw], items: Sequence[Work]) -> list[int]:
        """Of each row the draft, if it is right, or something else."""
        if self._model.deterministic:
            return sample(logits, draws)
        drafts = [token for item in items for token in item.tokens[1:]]
        certain = torch.ones((), dtype=torch.float64, device=logits.device)
        odds = [
            item.odds[i][item.tokens[1 + i]] if item.odds else certain
            for item in items
            for i in range(item.drafts)
        ]
        return judge(logits, draws, drafts, torch.stack(odds))

    def _odds(self, item: Work, number: int, device: torch.device) -> Tensor:
        """[V] the probabilities that one of its drafts was drawn with; there is one if it could be no other."""
        if item.odds:
            return item.odds[number]
        odds = torch.zeros(self._defined, dtype=torch.float64, device=device)
        odds[item.tokens[1 + number]] = 1
        return odds

    def _right(self, item: Work, drawn: Sequence[int], logits: Tensor, emit: Callable[[m.Event], None]) -> int:
        """How many drafts are right: up to the first that was not drawn, or with which the output ends."""
        call, right = item.generating, 0
        pairs = zip(drawn, item.tokens[1:], strict=True)
        same = list(takewhile(lambda pair: pair[0] == pair[1], pairs))
        entries = asked_logprobs([call] * len(same), drawn, logits, self._defined)
        for (token, _), entry in zip(same, entries, strict=True):
            if call.failure is not None:
                break
            right += 1
            event = call.drawn(token, entry)
            if event is not None:
                emit(event)
            if call.finish_reason is not None:
                break
        call.drafted(item.drafts, right, guessed=item.guessed)
        return right

    def settle(self, work: Sequence[Work], rows: Sequence[Tensor], previous: Tensor) -> None:
        """Write the block's rows of what a step has computed, before it is committed: each needs the token behind
        it, so that of the last one is left to whoever computes that token.

        rows: [n, hc, D] of each item's tokens; previous: [S, hc, D] of the token before them."""
        spans: list[Span] = []
        streams: list[Tensor] = []
        ids: list[int] = []
        for item, own, before in zip(work, rows, previous, strict=True):
            if not item.keeps_rows:
                continue
            state = item.call.sequence.held
            known = bool(state.length and not item.guessed)  # the row before is due too; to guess, it was written
            count = len(item.tokens) - 1 + known
            if count:
                span = Span(state.slot, state.length - known, count, state.chain, state.floor)
                spans.append(span)
                streams += [before[None], own[:-1]] if known else [own[:-1]]
                ids += item.tokens[1 - known :]
        if spans:
            pools = work[0].call.sequence.held.pools
            self._model.forward_mtp(torch.cat(streams), torch.tensor(ids), Batch(pools, spans))
