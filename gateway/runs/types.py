"""Programs and runs as they go over the wire. What a request has that is not known here is refused: a bound that
was misspelt would be none."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from weft.gateway.chat.base import Receipt
from weft.gateway.runs.inline_types import Inline


class RunLimits(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a run may take; the server's own bounds hold besides."""

    seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    tokens: Annotated[int, msgspec.Meta(gt=0, le=1 << 31)] | None = None


class RunSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Defaults of the run's generations, as SGLang's `run` takes them."""

    max_new_tokens: Annotated[int, msgspec.Meta(gt=0, le=1 << 31)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None


class RunOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """background: the run outlives its request, and is retrieved. stream: its events, as it is made. cache_salt:
    only runs and requests with the same one share KV."""

    arguments: dict[str, Any] = {}
    sampling: RunSampling = msgspec.field(default_factory=RunSampling)
    limits: RunLimits = msgspec.field(default_factory=RunLimits)
    stream: bool = False
    background: bool = False
    cache_salt: str | None = None
    metadata: dict[str, str] = {}


class InlineRun(RunOptions, kw_only=True, forbid_unknown_fields=True):
    program: Inline


class InlineExplain(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    program: Inline
    arguments: dict[str, Any] = {}
    cache_salt: str | None = None


class ExplainRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    arguments: dict[str, Any] = {}
    cache_salt: str | None = None


class ProgramInfo(msgspec.Struct, kw_only=True):
    """arguments: their JSON schema. hash: changes whenever the program's module does."""

    name: str
    tag: str
    hash: str
    description: str
    arguments: dict[str, Any]


class ToolInfo(msgspec.Struct, kw_only=True):
    name: str
    description: str
    arguments: dict[str, Any]


class ProgramList(msgspec.Struct):
    data: list[ProgramInfo]
    tools: list[ToolInfo]


class RunReceipt(msgspec.Struct, kw_only=True):
    """Of one primitive. path: of its state. name: its variable, or its tool. seconds: of a tool."""

    kind: Literal["gen", "select", "fork", "compute", "tool"]
    path: str
    name: str | None = None
    took: Receipt | None = None
    seconds: float | None = None


class RunUsage(msgspec.Struct, kw_only=True):
    """Over all states of a run, in tokens."""

    generations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    replayed_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    copied_bytes: int = 0
    tools: int = 0
    seconds: float = 0.0
    receipts: list[RunReceipt] = []


class RunError(msgspec.Struct, kw_only=True):
    """path, variable: where it happened, if in the program."""

    type: str
    message: str
    path: str | None = None
    variable: str | None = None


Status = Literal["queued", "running", "completed", "failed", "cancelled"]


class RunInfo(msgspec.Struct, kw_only=True):
    id: str
    program: str
    tag: str
    hash: str
    status: Status
    created_at: float
    ended_at: float | None = None
    variables: dict[str, Any] = {}
    value: Any = None
    text: str | None = None
    usage: RunUsage = msgspec.field(default_factory=RunUsage)
    error: RunError | None = None
    metadata: dict[str, str] = {}


class RunList(msgspec.Struct):
    data: list[RunInfo]


class RunEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """piece: more text of a variable. receipt: a primitive has ended. ended: the run has, and how. id: to go on
    from (Last-Event-ID)."""

    type: Literal["started", "piece", "receipt", "ended"]
    id: int = -1
    run: RunInfo | None = None
    path: str | None = None
    variable: str | None = None
    index: int | None = None
    text: str | None = None
    receipt: RunReceipt | None = None


class Step(msgspec.Struct, kw_only=True):
    """What a primitive would take now. history: tokens before it, drawn ones before it not counted (`behind` says
    how many there may be). shared: of those known already; replayed: of these run again; computed: run for it, but
    for what it draws itself; copied_bytes: of raw state, pages that are shared
    and written to come on top. differs: the first token that is not known where others are."""

    kind: Literal["gen", "select", "fork"]
    path: str
    name: str | None
    history: int
    shared: int
    replayed: int
    computed: int
    copied_bytes: int = 0
    draws: int = 0
    behind: int = 0
    reason: str = ""
    differs: str | None = None


class Explanation(msgspec.Struct, kw_only=True):
    """complete: whether all of the program could be foreseen; if not, `stopped` says where its way depends on what
    is drawn, or on a tool."""

    program: str
    hash: str
    steps: list[Step]
    complete: bool
    stopped: str | None
    shared: int
    replayed: int
    computed: int
    copied_bytes: int
    draws: int
