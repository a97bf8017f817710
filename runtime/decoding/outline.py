"""The parts of an output that is held to a grammar: reasoning, then content, then what the grammar says.

Reasoning and content are free but for the tokens that would end or break them. Reasoning has to end with
`</think>`. Where tool calls may follow content, the grammar holds from the DSML token on, and that only comes
where the layout has it: behind an empty line and `<`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weft.runtime.decoding.grammar import Constraint, Mask
from weft.runtime.errors import RequestError
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import DSML, THINK_END

_BEFORE_CALLS = b"\n\n<"


class Outline:
    """Where one output is in its parts."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        grammar = constraint.grammar
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._think_end = tokenizer.encode(THINK_END)[0]
        self._dsml = tokenizer.encode(DSML)[0]
        self._never = grammar.kind == "no_tool_calls"
        # What has to be drawn before the grammar holds: the ends of the parts before it.
        self._ends = [self._think_end] if grammar.thinking else []
        if grammar.optional:
            self._ends.append(self._dsml)
        self._tail = b""  # the last bytes of the content

    @property
    def waits(self) -> bool:
        """Whether its grammar is still being compiled."""
        return not self._constraint.is_ready

    @property
    def error(self) -> RequestError | None:
        return self._constraint.error

    def blocked(self, ahead: Sequence[int] = ()) -> list[int]:
        """Tokens that must not be drawn next, or behind these."""
        ends, _, tail = self._after(ahead)
        if ends[:1] == [self._think_end]:
            return [self._tokenizer.eos, self._dsml]
        return [self._dsml] if ends and (self._never or tail != _BEFORE_CALLS) else []

    def mask(self, ahead: Sequence[int] = ()) -> Mask | None:
        """[V] what the grammar allows next, or behind these; None where it does not hold."""
        ends, held, _ = self._after(ahead)
        return None if ends else self._constraint.mask(held)

    def prepare(self, ahead: Sequence[int] = ()) -> None:
        """Tokens are about to be drawn, perhaps behind these: have the masks computed meanwhile."""
        if self._holds:
            self._constraint.prepare(ahead)

    def certain(self, most: int) -> list[int]:
        """Tokens that the grammar leaves no choice about."""
        return self._constraint.certain(most) if self._holds else []

    @property
    def _holds(self) -> bool:
        """Whether the grammar holds now, and can."""
        return not self._ends and not self.waits and self.error is None

    def take(self, token: int) -> bool:
        """It was drawn; whether nothing can follow."""
        if not self._ends:
            self._constraint.take(token)
            return self._constraint.is_over
        self._ends, _, self._tail = self._after([token])
        return False

    def _after(self, ahead: Sequence[int]) -> tuple[list[int], Sequence[int], bytes]:
        """The parts' ends still to come, the grammar's tokens, and the last bytes of content, behind these."""
        ends, tail = self._ends, self._tail
        for i, token in enumerate(ahead):
            if not ends:
                return ends, ahead[i:], tail
            if token == ends[0]:
                ends, tail = ends[1:], b""
            elif len(ends) == 1 and ends[0] == self._dsml:
                tail = (tail + self._tokenizer.token_bytes(token))[-len(_BEFORE_CALLS) :]
        return ends, [], tail


class Beginning:
    """An output whose first tokens have to spell a text, and may go on behind it; then it is free."""

    waits, error = False, None

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._rest = text.encode()
        self._tokenizer = tokenizer

    def blocked(self, ahead: Sequence[int] = ()) -> list[int]:
        return []

    def mask(self, ahead: Sequence[int] = ()) -> Mask | None:
        rest = self._behind(ahead)
        if not rest:
            return None
        allowed = np.zeros(self._tokenizer.size, np.bool_)
        allowed[self._tokenizer.beginning(rest)] = True
        return allowed

    def prepare(self, ahead: Sequence[int] = ()) -> None:
        """Masks are found as they are asked for."""

    def certain(self, most: int) -> list[int]:
        return []

    def take(self, token: int) -> bool:
        self._rest = self._behind([token])
        return False

    def _behind(self, ahead: Sequence[int]) -> bytes:
        rest = self._rest
        for token in ahead:
            rest = rest[len(self._tokenizer.token_bytes(token)) :]
        return rest
