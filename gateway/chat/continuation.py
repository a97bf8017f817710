"""Tokens behind tokens, without a chat around them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec

from weft.gateway.chat.base import Receipt, receipt
from weft.gateway.chat.drawing import Drawn, Lease, draw, merged
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import ContextLengthError
from weft.runtime.text.turns import turn_cuts


@dataclass(frozen=True)
class Continuation:
    """One generation. params: with a seed. scored: from which of its tokens on the prompt's log-probabilities are
    wanted too (the first one has none), with `params.logprobs` alternatives. field: its name in errors."""

    tokens: Sequence[int]
    params: SamplingParams
    namespace: str = ""
    scored: int | None = None
    lease: Lease | None = None
    field: str = "prompt"

    def check(self, engine: Engine) -> None:
        """Raises `ContextLengthError` if it does not fit."""
        room = engine.context - len(self.tokens)
        if room < 0:
            raise ContextLengthError(self.field, len(self.tokens), f"the context holds {engine.context} tokens")
        if self.params.max_tokens > room:
            reason = f"behind {len(self.tokens)} tokens; the context holds {engine.context}"
            raise ContextLengthError("max_tokens", self.params.max_tokens, reason)


@dataclass(frozen=True)
class Piece:
    """More of continuation `index`."""

    index: int
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[m.Logprob]


@dataclass(frozen=True)
class Finished:
    """Continuation `index` is whole. tokens: all drawn; kept: those that lie wholly in the text; logprobs: of
    them."""

    index: int
    work: Continuation
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[m.Logprob]
    prompt_logprobs: Sequence[m.Logprob]
    reason: Literal["stop", "length"]
    stop: str | int | None
    receipt: Receipt
    kept: int


Told = Callable[[Receipt], None]


def stream(engine: Engine, works: Sequence[Continuation], told: Told) -> AsyncGenerator[Piece | Finished]:
    """Pieces of all as they come, then their ends. What prompts share is computed once. told: of each end."""
    for work in works:
        work.check(engine)
    return merged([_one(engine, work, index, told) for index, work in enumerate(works)])


async def gather(engine: Engine, works: Sequence[Continuation], told: Told) -> list[Finished]:
    """Their ends, in order."""
    async with aclosing(stream(engine, works, told)) as events:
        ends = [event async for event in events if isinstance(event, Finished)]
    return sorted(ends, key=lambda end: end.index)


async def _one(engine: Engine, work: Continuation, index: int, told: Told) -> AsyncGenerator[Piece | Finished]:
    tokens: list[int] = []
    text: list[str] = []
    logprobs: list[m.Logprob] = []
    prompt = await _scored(engine, work)
    cuts = turn_cuts(engine.tokenizer, work.tokens)
    opened = lambda: engine.open(work.tokens, cuts=cuts, namespace=work.namespace)  # noqa: E731
    async with aclosing(draw(opened, work.params, work.lease)) as events:
        async for event in events:
            if isinstance(event, Drawn):
                done, took = event.done, receipt(event.done.usage)
                took = msgspec.structs.replace(took, computed=took.computed + prompt.computed)
                told(took)
                assert done.finish_reason in ("stop", "length")
                reason: Literal["stop", "length"] = "stop" if done.finish_reason == "stop" else "length"
                yield Finished(
                    index,
                    work,
                    "".join(text),
                    tokens,
                    logprobs[: done.kept],
                    prompt.found,
                    reason,
                    done.stop,
                    took,
                    done.kept,
                )
                return
            tokens += event.tokens
            text.append(event.text)
            logprobs += event.logprobs
            yield Piece(index, event.text, event.tokens, event.logprobs)


@dataclass(frozen=True)
class _Scored:
    found: Sequence[m.Logprob] = ()
    computed: int = 0


async def _scored(engine: Engine, work: Continuation) -> _Scored:
    if work.scored is None or work.scored >= len(work.tokens):
        return _Scored()
    with engine.open(work.tokens[: work.scored], namespace=work.namespace) as sequence:
        found = await sequence.append_scored(work.tokens[work.scored :], work.params.logprobs or 0)
        return _Scored(found, sequence.computed)
