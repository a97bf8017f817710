"""Sequences of the engine for texts that grow: continued from what is held of them, and kept when longer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from weft.backend.borders import Border, encoded, given_back
from weft.backend.histories import Histories
from weft.backend.report import Request
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import EngineDead, Overloaded, RequestError
from weft.runtime.text.turns import turn_cuts

T = TypeVar("T")
_ATTEMPTS = 3  # at computing a text on cores that die


class Texts:
    """Owns the histories. Used from one event loop only."""

    def __init__(self, engine: Engine, live: int, heal: bool) -> None:
        """live: histories whose KV is held. heal: as for `DeepSeekV4Backend`."""
        self.engine = engine
        self.histories = Histories(live=live)
        self._heal = heal

    async def continued(self, text: str) -> tuple[Sequence, list[int]]:
        """A sequence of the caller's own whose history is this text, computed; and its tokens."""
        return await self.with_room(lambda: self._once(text))

    async def _once(self, text: str) -> tuple[Sequence, list[int]]:
        if not text:  # not remembered: it begins every text, also those that spell out their BOS
            return self.engine.open([self.engine.tokenizer.bos]), [self.engine.tokenizer.bos]
        while True:
            found = self.histories.longest_prefix(text)
            if found is not None and found[0] == text and found[1].sequence is not None:
                return await self.histories.fork(found[1]), found[1].tokens
            tokens, border = self.encoded(text)
            base = await self._base(text, tokens)
            # Remembered before it is computed: siblings that come now wait for it instead of computing it
            # again. One that came during the fork above was first: then `base` is closed and theirs is used.
            self.histories.put(text, tokens, base, border)

    async def _base(self, text: str, tokens: list[int]) -> Sequence:
        """A sequence for this text, made from the longest held beginning of it."""
        held = self.histories.longest_held(text, tokens)
        if held is None:
            return self.open(tokens)
        base = await self.histories.fork(held)
        more = tokens[len(held.tokens) :]
        base.extend(more, cuts=turn_cuts(self.engine.tokenizer, more))
        return base

    def encoded(self, text: str) -> tuple[list[int], Border]:
        found = self.histories.longest_prefix(text)
        if found is None:
            return encoded(self.engine.tokenizer, text)
        prefix, known = found
        if prefix == text:
            return known.tokens, known.border
        return encoded(self.engine.tokenizer, text, known.tokens, known.border)

    def open(self, tokens: list[int]) -> Sequence:
        return self.engine.open(tokens, cuts=turn_cuts(self.engine.tokenizer, tokens))

    async def with_room(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Held histories are the first to go when KV memory runs out, and all go with a core that died: their
        tokens are known, so the attempt after that computes them again."""
        deaths = 0
        while True:
            try:
                return await attempt()
            except Overloaded:
                if not self.histories.release(0.5):
                    raise
            except EngineDead:
                self.histories.release()
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise

    async def begin(self, request: Request) -> tuple[Sequence, list[int]]:
        """`continued` for a generation. To heal, the text's last token is drawn again, or a longer one."""
        tokens, border = self.encoded(request.text)
        if (
            self._heal
            and request.params.grammar is None
            and (begins := given_back(self.engine.tokenizer, tokens, border))
        ):
            request.params = msgspec.structs.replace(request.params, begins=begins)
            return self.open(tokens[:-1]), tokens[:-1]
        return await self.continued(request.text)

    async def keep(
        self, request: Request, text: str, prompt: list[int], tokens: list[int], done: m.Done, sequence: Sequence
    ) -> None:
        """Remember prompt and output as one history. Tokens behind the returned text are cut off; a token that
        the text ends inside of is replaced by the tokens of its first part."""
        before, text = request.text.removesuffix(request.params.begins), request.params.begins + text
        kept = tokens[: done.kept]
        said = self.engine.tokenizer.decode(kept)
        rest = self.engine.tokenizer.encode(text[len(said) :])
        length = len(prompt) + len(kept)
        held: Sequence | None = sequence
        try:
            await sequence.truncate(length)
            if rest:
                sequence.extend(rest)
        except RequestError:  # the stop was several tokens, the first of them computed: this KV has gone too far
            sequence.close()
            held = None
        self.histories.put(before + text, prompt + kept + rest, held, Border(len(before + said), length))
