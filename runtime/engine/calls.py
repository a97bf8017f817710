"""What a running call knows and does; the core decides when."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import Draw, TokenLogprob, logprobs
from weft.runtime.decoding.stopping import StopWatch
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError
from weft.runtime.model.base import Network
from weft.runtime.text.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from weft.runtime.cache.prefix import Plan
    from weft.runtime.decoding.outline import Beginning, Outline
    from weft.runtime.engine.pace import Pace
    from weft.runtime.engine.sequences import Sequence


_MORE = 8  # tokens that an output longer than usual is still expected to have


class Call:
    """One call on one sequence."""

    def __init__(self, id: int, sequence: Sequence) -> None:
        self.id = id
        self.sequence = sequence
        # Tokens appended by the caller while this call ran; they join the history when it ends.
        self.then_extend: list[int] = []
        self.then_cuts: list[int] = []
        self.deadline: float | None = None
        self.submitted = time.monotonic()
        self._begun: float | None = None
        self._taken = False
        self._history = 0
        self._cached = 0
        self._computed = 0
        self._matched = 0
        self._replayed = 0
        self._reason = ""
        self.copied = 0
        self.passed_over = 0

    @property
    def has_run(self) -> bool:
        return self._computed > 0

    def take_turn(self) -> None:
        """The calls before it on the sequence have ended. Asked again, does nothing."""
        if not self._taken:
            self._taken = True
            self._history = len(self.sequence.tokens)
            self._cached = self.sequence.computed
            self._on_turn()

    def _on_turn(self) -> None:
        """What a kind of call does when its turn comes."""

    @property
    def left(self) -> int:
        """Tokens to compute before it can act."""
        return len(self.sequence.tokens) - self.sequence.computed

    def append(self, tokens: list[int], cuts: Iterable[int]) -> None:
        """Tokens that join the history when the call ends; cuts: within them."""
        self.then_cuts.extend(len(self.then_extend) + cut for cut in cuts)
        self.then_extend.extend(tokens)

    def final_length(self) -> int:
        """Tokens the history will have at most when the call ends."""
        return len(self.sequence.tokens)

    def expected_length(self, usual: int) -> int:
        """Tokens the history is likely to have then, if outputs are about `usual` tokens long."""
        return self.final_length()

    def known_limit(self) -> int:
        """How much of the history may be taken from what is known: the call needs the streams behind it."""
        return len(self.sequence.tokens)

    def resumed(self, plan: Plan, copied: int) -> None:
        """Its sequence has a state now, or again after it gave way."""
        self.copied += copied
        self._replayed += plan.replayed
        if not self.has_run:
            self._cached, self._matched, self._reason = min(plan.start, self._history), plan.matched, plan.reason

    def begin(self, now: float) -> None:
        """The call's first tokens were run in a step that started at `now`."""
        if self._begun is None:
            self._begun = now

    def ran(self, tokens: list[int], streams: Tensor, previous: Tensor, model: Network) -> None:
        """These tokens were computed. streams: [n, hc, D] of them; previous: [hc, D] of the token before."""
        self._computed += len(tokens)

    def usage(self, generated: int = 0, first_token: float = 0.0) -> m.Usage:
        now = time.monotonic()
        return m.Usage(
            history=self._history,
            cached=self._cached,
            matched=self._matched,
            replayed=self._replayed,
            computed=self._computed,
            copied=self.copied,
            reason=self._reason,
            generated=generated,
            queued=(self._begun or now) - self.submitted,
            first_token=first_token,
            total=now - self.submitted,
        )

    def done(self) -> m.Done:
        return m.Done(call=self.id, usage=self.usage(), length=len(self.sequence.tokens))


class ForkCall(Call):
    def __init__(self, id: int, sequence: Sequence, children: list[int]) -> None:
        super().__init__(id, sequence)
        self.children = children


class ScoreCall(Call):
    """Appends `tokens` and gathers the log-probability of each, given all before it.

    defined: ids from this one on are padding of the head, never alternatives."""

    def __init__(self, id: int, sequence: Sequence, tokens: list[int], top: int, defined: int) -> None:
        super().__init__(id, sequence)
        self.tokens = tokens
        self.top = top
        self._defined = defined
        self.results: list[TokenLogprob] = []
        self._first = 0

    def final_length(self) -> int:
        return len(self.sequence.tokens) + (0 if self._taken else len(self.tokens))

    def _on_turn(self) -> None:
        self._first = len(self.sequence.tokens)
        self.sequence.tokens.extend(self.tokens)

    def known_limit(self) -> int:
        return max(self._first, 1) + len(self.results)

    def ran(self, tokens: list[int], streams: Tensor, previous: Tensor, model: Network) -> None:
        super().ran(tokens, streams, previous, model)
        end = self.sequence.computed
        start = end - len(tokens)
        # The streams at position i predict token i + 1; the very first token has none before it.
        # What was scored before its KV was taken away is not scored again.
        known = max(self._first, 1) + len(self.results)
        targets = range(max(start, known), min(end, self._first + len(self.tokens)))
        if targets:
            rows = torch.cat((previous[None], streams))[targets.start - start : targets.stop - start]
            chosen = self.sequence.tokens[targets.start : targets.stop]
            self.results += logprobs(model.logits(rows), chosen, [self.top] * len(chosen), self._defined)

    def done(self) -> m.Done:
        return m.Done(
            call=self.id,
            usage=self.usage(),
            length=len(self.sequence.tokens),
            logprobs=[_logprob(r) for r in self.results],
        )


class GenerateCall(Call):
    """Draws tokens until a stop or the length is reached."""

    def __init__(
        self,
        id: int,
        sequence: Sequence,
        params: SamplingParams,
        tokenizer: Tokenizer,
        outline: Outline | Beginning | None = None,
    ) -> None:
        super().__init__(id, sequence)
        self.outline = outline
        self.params = params
        self.finish_reason: str | None = None if params.max_tokens else "length"
        self.stop: str | int | None = None
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._watch = StopWatch(params)
        self._tokens: list[int] = []
        self._counts: Counter[int] = Counter()
        # Characters up to the end of the last one that each token has a byte of; the token that stops has none.
        self._text_ends: list[int] = []
        self._decoded = 0
        self._hidden = len(params.begins)  # characters still to come that are the prompt's
        self._first_token = 0.0
        self.pace: Pace | None = None  # once it may draft
        self._drafted = self._accepted = 0
        # In fast mode, what a draft of the next token was drawn with that was rejected.
        self.refused: Tensor | None = None
        eos = () if params.ignore_eos and outline is None else (tokenizer.eos,)
        self._stop_ids = {*eos, *params.stop_token_ids}
        for field, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in ids:
                if not 0 <= token < tokenizer.size:
                    raise RequestError(field, token, f"the tokenizer defines {tokenizer.size} ids")

    @property
    def drawn_count(self) -> int:
        return len(self._tokens)

    def final_length(self) -> int:
        return len(self.sequence.tokens) + self.params.max_tokens - len(self._tokens)

    def expected_length(self, usual: int) -> int:
        return min(self.final_length(), len(self.sequence.tokens) + max(usual - len(self._tokens), _MORE))

    def draw(self, ahead: Seq[int] = ()) -> Draw:
        """How to sample the next token, or the one behind `ahead` if these come first. Before `min_tokens`, the
        tokens that would end the output are blocked."""
        early = len(self._tokens) + len(ahead) < self.params.min_tokens
        blocked = sorted(self._stop_ids) if early else []
        blocked += self.outline.blocked(ahead) if self.outline is not None else []
        assert self.params.seed is not None
        history, counts = self.sequence.tokens, self._counts
        position = len(history) + len(ahead)
        if ahead:
            counts = counts + Counter(ahead)
            if self.params.repetition_penalty != 1:  # nothing else reads the history
                history = [*history, *ahead]
        allowed = self.outline.mask(ahead) if self.outline is not None else None
        refused = None if ahead else self.refused
        return Draw(self.params, self.params.seed, position, blocked, counts, history, allowed, refused)

    @property
    def waits(self) -> bool:
        """Whether its grammar is still being compiled."""
        return self.outline is not None and self.outline.waits

    @property
    def failure(self) -> RequestError | None:
        """Why its grammar cannot hold it."""
        return self.outline.error if self.outline is not None else None

    def prepare(self, ahead: Seq[int] = ()) -> None:
        """Tokens are about to be drawn, perhaps behind these: have the masks computed meanwhile."""
        if self.outline is not None:
            self.outline.prepare(ahead)

    def certain(self, most: int) -> list[int]:
        """Tokens that its grammar leaves no choice about."""
        return self.outline.certain(most) if self.outline is not None else []

    def drafted(self, count: int, right: int, *, guessed: bool) -> None:
        """So many tokens were drafted, and the first `right` of them drawn. guessed: by the MTP block."""
        if guessed:
            assert self.pace is not None
            self.pace.learn(count, right)
        self._drafted += count
        self._accepted += right

    def drawn(self, token: int, entry: TokenLogprob | None) -> m.Delta | None:
        """Take the sampled token, and its log-probabilities if asked for, into the history; returns what
        may be shown of it."""
        if not self._tokens:
            self._first_token = time.monotonic() - self.submitted
        self.refused = None
        self.sequence.tokens.append(token)
        self._tokens.append(token)
        self._counts[token] += 1
        found = [_logprob(entry)] if entry is not None else []
        if token in self._stop_ids:
            self.finish_reason, self.stop = "stop", token
            return m.Delta(call=self.id, tokens=[token], text="", logprobs=found)
        over = self.outline is not None and self.outline.take(token)
        piece = self._stream.feed(token)
        hidden = min(self._hidden, len(piece))
        self._hidden, piece = self._hidden - hidden, piece[hidden:]
        self._decoded += len(piece)
        self._text_ends.append(self._decoded + len(self._stream.unfinished))
        self._check(self._watch.feed(piece, may_stop=len(self._tokens) >= self.params.min_tokens))
        if self.finish_reason is None and over:
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self._tokens) >= self.params.max_tokens:
            self.finish_reason = "length"
        return m.Delta(call=self.id, tokens=[token], text=self._watch.showable(), logprobs=found)

    def _check(self, stop: str | None) -> None:
        if stop is not None:
            self.finish_reason, self.stop = "stop", stop

    def flush(self) -> m.Delta | None:
        """The text still held back, once the output has ended."""
        if not isinstance(self.stop, str):
            self._check(self._watch.feed(self._stream.finish()))
        text = self._watch.showable(final=True)
        return m.Delta(call=self.id, tokens=[], text=text) if text else None

    def done(self) -> m.Done:
        length = len(self._watch.text)
        kept = sum(end <= length for end in self._text_ends)
        assert self.finish_reason is not None
        usage = self.usage(len(self._tokens), self._first_token)
        return m.Done(
            call=self.id,
            usage=msgspec.structs.replace(usage, drafted=self._drafted, accepted=self._accepted),
            length=len(self.sequence.tokens),
            finish_reason=self.finish_reason,
            stop=self.stop,
            kept=kept,
        )


def asked_logprobs(
    calls: Seq[GenerateCall], tokens: Seq[int], logits: Tensor, defined: int
) -> list[TokenLogprob | None]:
    """Of each call's token under its row of logits [n, V], for the calls that asked. defined: as of `logprobs`."""
    asked = {i: call.params.logprobs for i, call in enumerate(calls) if call.params.logprobs is not None}
    if not asked:
        return [None] * len(calls)
    rows = list(asked)
    found = logprobs(logits[rows], [tokens[i] for i in rows], list(asked.values()), defined)
    entries = dict(zip(rows, found, strict=True))
    return [entries.get(i) for i in range(len(calls))]


def _logprob(result: TokenLogprob) -> m.Logprob:
    return m.Logprob(result.token, result.logprob, list(result.top))
