"""What an assistant turn is, whatever API asked for it: its request, what comes while it is drawn, what it
took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.text.chat import Prompt
from weft.runtime.text.chat_output import Reply, ReplyDelta


@dataclass(frozen=True)
class TurnRequest:
    """messages, tools, tool_choice and response_format in the shape of Chat Completions (`runtime.text.chat`).

    params: but for max_tokens and the grammar. max_tokens: None for what the context leaves. n: so many replies;
    reply i draws with seed + i. session: whose KV to lease behind the turn. lease: seconds, None for the server's.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True
    response_format: Mapping[str, Any] | None = None
    thinking: bool = False
    effort: str | None = None
    max_tokens: int | None = None
    n: int = 1
    namespace: str = ""
    session: str | None = None
    lease: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A turn that is known to be well-formed. messages: as they were laid out, with what was left out put back.
    ids: of its replies, under which they are replayed."""

    request: TurnRequest
    messages: Sequence[Mapping[str, Any]]
    prompt: Prompt
    params: SamplingParams
    ids: Sequence[str]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation took, in tokens. prompt = cached + what of it was computed; replayed: known ones that were
    run again to bring raw state back, matched: known ones, reason: why not all were cached (`no_tokens`: never
    seen; `chain_evicted`, `no_checkpoint`). copied_bytes: of KV. Times are seconds."""

    prompt: int = 0
    cached: int = 0
    matched: int = 0
    replayed: int = 0
    computed: int = 0
    copied_bytes: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    reason: str = ""
    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


def receipt(usage: m.Usage, before: m.Usage | None = None) -> Receipt:
    """before: of the fork that the generation's sequence began with, which then computed the prompt."""
    source = before or usage
    extra = before or m.Usage()
    return Receipt(
        prompt=usage.history,
        cached=source.cached,
        matched=max(source.matched, source.cached),
        replayed=extra.replayed + usage.replayed,
        computed=extra.computed + usage.computed,
        copied_bytes=extra.copied + usage.copied,
        generated=usage.generated,
        drafted=usage.drafted,
        accepted=usage.accepted,
        reason=source.reason,
        queued=extra.queued + usage.queued,
        first_token=extra.total + usage.first_token,
        total=extra.total + usage.total,
    )


@dataclass(frozen=True)
class Part:
    """More of reply `index`."""

    index: int
    delta: ReplyDelta
    logprobs: Sequence[m.Logprob] = ()


@dataclass(frozen=True)
class Ended:
    """Reply `index` is whole. delta: what was held back until now. id: it is replayed under (`Replay`).
    tokens: those drawn that lie in its text, the end's own included; reasoning: so many of them are. logprobs: of
    those that lie in its text."""

    index: int
    delta: ReplyDelta
    reply: Reply
    stop: str | int | None
    receipt: Receipt
    tokens: Sequence[int]
    reasoning: int
    id: str
    logprobs: Sequence[m.Logprob] = field(default=())
