"""Outputs held to a regular expression, a schema, a Lark grammar, choices or tool calls, through llguidance.

Grammars are compiled, and masks computed, by threads beside the core; llguidance gives up the interpreter's lock
meanwhile. While a step computes tokens, the masks of what may follow them are on their way; if that is not known
yet (a draft was wrong), the mask is waited for.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from weft.runtime.decoding.params import Grammar
from weft.runtime.decoding.tool_calls import JSON_FORM, lark_of
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import DSML

_REASON = 300  # characters of an explanation
_SECONDS = 20.0  # that compiling may take
Mask = NDArray[np.bool_]
_ESCAPES = r"(?<!\\)(?:\\\\)*"  # backslashes that are escaped themselves
# Several times what large schemas take; a grammar that needs more is refused.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=250_000, max_grammar_size=500_000, step_max_items=100_000)


class Grammars:
    """Compiled grammars of one tokenizer, the most recently used ones kept. Closes its threads with the core."""

    def __init__(self, tokenizer: Tokenizer, threads: int = 2, kept: int = 256) -> None:
        self._size = tokenizer.size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weft-grammar")
        self._own = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.size, eos_token=tokenizer.eos)
        self._dsml = tokenizer.encode(DSML)[0]
        self._kept = kept
        self._compiled: OrderedDict[Grammar, Future[Any]] = OrderedDict()

    def constraint(self, grammar: Grammar) -> Constraint:
        """One for an output. Asks for the grammar to be compiled, unless it was."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._pool.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > self._kept:
            self._compiled.popitem(last=False)
        return Constraint(grammar, self._compiled[grammar], self._pool, self._size)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Any:
        """A matcher at the beginning; raises `RequestError` naming what is wrong."""
        try:
            source = self._source(grammar)
        except ValueError as error:
            raise refusal(grammar, str(error)) from None
        matcher = llguidance.LLMatcher(self._own, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise refusal(grammar, matcher.get_error())
        return matcher

    def _source(self, grammar: Grammar) -> str:
        make = llguidance.LLMatcher
        match grammar.kind:
            case "regex":
                return make.grammar_from_regex(grammar.text)
            case "json_schema":
                return make.grammar_from_json_schema(_object(grammar.text), overrides=JSON_FORM)
            case "lark":
                return make.grammar_from_lark(grammar.text)
            case "choices":
                choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
                return make.grammar_from_lark(f"start: {choices}")
            case "tool_calls":
                return make.grammar_from_lark(lark_of(grammar, self._dsml))
            case "no_tool_calls":  # never begins
                return make.grammar_from_regex("")


def _object(schema: str) -> str:
    """The schema as an object, which llguidance asks for; `ValueError` if it asks for characters that it would let
    names be spelled with, too."""
    if odd := re.search(rf"{_ESCAPES}(\\u00(?:0[0-7be-f]|1[0-9a-f]))", schema, re.IGNORECASE):
        raise ValueError(f"cannot hold to {odd[1]}: control characters are not written")
    return {"true": "{}", "false": '{"enum": []}'}.get(schema.strip(), schema)


def refusal(grammar: Grammar, reason: str) -> RequestError:
    if missing := re.search(r"Resource '([^']*)' is not present", reason):
        reason = f'cannot follow "$ref" to {missing[1]}: nothing is fetched'
    return RequestError(grammar.kind, grammar.text, " ".join(reason.split())[:_REASON])


class Constraint:
    """Where one output is in its grammar. Used by one thread, but for the masks that it has asked for."""

    def __init__(self, grammar: Grammar, compiled: Future[Any], pool: ThreadPoolExecutor, size: int) -> None:
        self.grammar = grammar
        self._compiled = compiled
        self._pool = pool
        self._size = size
        self._own: Any = None
        self._late = time.monotonic() + _SECONDS
        self._failure: RequestError | None = None
        # The masks asked for: that of now, and those behind each of `_ahead`.
        self._ahead: list[int] = []
        self._masks: Future[list[Mask]] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the grammar is compiled, or was refused."""
        return self._compiled.done() or time.monotonic() > self._late

    @property
    def error(self) -> RequestError | None:
        """Why it was refused, perhaps while it was in use; then its masks hold nothing back."""
        if self._failure is None and self._own is None and self.is_ready:
            late = refusal(self.grammar, f"not compiled within {_SECONDS:g} seconds")
            error = self._compiled.exception() if self._compiled.done() else late
            assert error is None or isinstance(error, RequestError)
            self._failure = error
        return self._failure

    @property
    def _matcher(self) -> Any:
        if self._own is None:
            self._own = self._compiled.result().deep_copy()
        return self._own

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return self._failure is None and bool(self._settled().is_stopped())

    def certain(self, most: int) -> list[int]:
        """Tokens that follow in any case, or in the way they are usually written; at most so many."""
        tokens: list[int] = self._settled().compute_ff_tokens() if self._failure is None else []
        return tokens[:most]

    def prepare(self, ahead: Sequence[int] = ()) -> None:
        """Have the mask of now computed, and those behind each of these tokens, as far as they are allowed."""
        known: list[Mask] = []
        if self._masks is not None:
            shared = min(len(self._ahead), len(ahead))
            if self._ahead[:shared] == list(ahead)[:shared]:
                if shared == len(ahead):
                    return
                known = self._masks.result()
        matcher, self._ahead = self._settled(), list(ahead)
        self._masks = self._pool.submit(_masks, matcher, self._ahead, self._size, known)

    def mask(self, ahead: Sequence[int] = ()) -> Mask:
        """[V] what is allowed now, or behind these tokens (anything, if they are not allowed themselves)."""
        self.prepare(ahead)
        assert self._masks is not None
        masks = self._masks.result()
        self._note_failure()
        if self._failure is not None or len(ahead) >= len(masks):
            return np.ones(self._size, np.bool_)
        return masks[len(ahead)]

    def take(self, token: int) -> None:
        """The token was drawn; it was allowed."""
        masks, self._masks = self._masks, None
        taken = self._after(masks).consume_token(token)
        self._note_failure()
        assert taken or self._failure is not None, "a token was drawn that the grammar does not allow"
        if masks is not None and self._ahead[:1] == [token]:
            rest: Future[list[Mask]] = Future()
            rest.set_result(masks.result()[1:])
            self._ahead, self._masks = self._ahead[1:], rest

    def _note_failure(self) -> None:
        """The matcher may have met a limit; it says so, and would let an output end anywhere."""
        if self._failure is None and self._matcher.is_error():
            self._failure = refusal(self.grammar, self._matcher.get_error())

    def _settled(self) -> Any:
        """The matcher, which no thread is using."""
        return self._after(self._masks)

    def _after(self, masks: Future[list[Mask]] | None) -> Any:
        if masks is not None:
            masks.result()
        return self._matcher


def _masks(matcher: Any, ahead: Sequence[int], size: int, known: Sequence[Mask]) -> list[Mask]:
    """Runs in a thread of its own; the matcher is where it was when it is done. known: the first masks."""
    masks, taken = list(known), 0
    for i in range(len(ahead) + 1):
        if i == len(masks):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            masks.append(np.unpackbits(bits, bitorder="little")[:size].astype(np.bool_))
        if i == len(ahead) or not masks[i][ahead[i]] or matcher.try_consume_tokens([ahead[i]]) != 1:
            break
        taken += 1
    if taken:
        matcher.rollback(taken)
    return masks
