"""What a state asks of the engine: generations and selections, with sglang's parameters and meta information."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.lang import ir

from weft.backend.convert import token_entry
from weft.backend.executor.leaves import Held
from weft.backend.executor.transcript import Transcript
from weft.backend.report import Report, Request
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError

if TYPE_CHECKING:
    from weft.backend.executor.lane import Lane

_GREEDY = 1e-5


async def generate(lane: Lane, leaf: ir.SglGen) -> None:
    """Draw n completions; the first goes on the transcript."""
    lane.scope.check_spent()
    asked = resolved(lane.ground.defaults, leaf.sampling_params)
    state = SimpleNamespace(text_=lane.transcript.text, images_=[], num_api_spec_tokens=None)
    request = Request(state, asked)
    if isinstance(leaf, Held) and leaf.grammar is not None:
        if request.params.grammar is not None:
            raise RequestError("tools", leaf.grammar.kind, "cannot be combined with a regex, schema or dtype")
        request.params = msgspec.structs.replace(request.params, grammar=leaf.grammar)
    lane.begins(leaf.name)
    count = request.count
    others = lane.transcript.fork(count - 1) if count > 1 else []
    try:
        runs = [_complete(lane, leaf, request, own, i) for i, own in enumerate((lane.transcript, *others))]
        found = [await runs[0]] if count == 1 else await _all(runs)
    finally:
        for other in others:
            other.close()
    if count == 1:
        lane.set(leaf.name, *found[0])
    else:
        lane.set(leaf.name, [text for text, _ in found], [meta for _, meta in found])


async def _all(runs: list[Any]) -> list[Any]:
    """Their results; when one fails or this is cancelled, none goes on."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _complete(
    lane: Lane, leaf: ir.SglGen, request: Request, transcript: Transcript, index: int
) -> tuple[str, dict[str, Any]]:
    scope, ground = lane.scope, lane.ground
    report = Report(request, ground.engine, 0)
    pieces: list[str] = []
    start = request.prompt_logprobs_from
    if start is not None:
        tokens = await transcript.tokens()
        report.first = tokens[0] if start == 0 else None
        with ground.engine.open(tokens[:start], namespace=ground.namespace) as sequence:
            top = request.params.logprobs or 0
            report.prompt = await sequence.append_scored(tokens[start:], top, scope.left())
            scope.worked(sequence.computed)

    def more(delta: m.Delta) -> None:
        scope.spend(len(delta.tokens))
        report.prompt_tokens = transcript.prompt_tokens
        report.add(delta)
        pieces.append(delta.text)
        if ground.emit is not None:
            lane.piece(leaf.name, delta.text, report.meta(), index)

    done = await transcript.generate(request.params, scope.left(), more)
    scope.add(done.usage)
    scope.tell("gen", lane.path, leaf.name, done.usage)
    report.prompt_tokens = transcript.prompt_tokens
    meta = report.meta(done)
    lane.piece(leaf.name, "", meta, index)
    return "".join(pieces), meta


def resolved(defaults: Any, own: Any) -> Any:
    """The run's sampling parameters with those that a gen names itself. Neither is changed."""
    asked = copy.copy(defaults)
    for name, value in vars(own).items():
        if value is not None and value != (None,):
            setattr(asked, name, value)
    return asked


async def select(lane: Lane, leaf: ir.SglSelect) -> None:
    """Score every choice behind the text, in one batch, and let the choice's method decide."""
    choices, method = leaf.choices, leaf.choices_method
    if leaf.temperature > _GREEDY:
        raise RequestError("temperature", leaf.temperature, "select scores its choices, it does not sample")
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError("choices", choices, "must be non-empty strings")
    engine = lane.ground.engine
    scored, took = await lane.transcript.score(choices, lane.scope.left())
    lane.scope.tell("select", lane.path, leaf.name, took)
    entries = [[token_entry(r, lambda id: engine.tokenizer.decode([id])) for r in own] for _, own in scored]
    unconditional = None
    if method.requires_unconditional_logprobs:
        unconditional = await _all([_unconditional(lane, tokens) for tokens, _ in scored])
    decision = method(
        choices=choices,
        normalized_prompt_logprobs=[sum(e[0] for e in own) / len(own) for own in entries],
        input_token_logprobs=entries,
        output_token_logprobs=[[] for _ in choices],
        unconditional_token_logprobs=unconditional,
    )
    lane.begins(leaf.name)
    lane.add(decision.decision)
    lane.set(leaf.name, decision.decision, decision.meta_info)
    lane.piece(leaf.name, decision.decision, decision.meta_info)


async def _unconditional(lane: Lane, tokens: list[int]) -> list[list[Any]]:
    """A choice on its own; its first token has nothing to be conditioned on."""
    engine = lane.ground.engine
    with engine.open([], namespace=lane.ground.namespace) as sequence:
        results = await sequence.append_scored(tokens, deadline=lane.scope.left())
    own = [token_entry(result, lambda id: engine.tokenizer.decode([id])) for result in results]
    return [[None, tokens[0], engine.tokenizer.decode(tokens[:1])], *own]
