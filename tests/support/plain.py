"""A history with variables, its generations one after another: what programs mean, without what makes it fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine


@dataclass
class Plain:
    """A history as parts, text or drawn tokens, each text encoded together with those beside it."""

    engine: Engine
    parts: list[str | list[int]] = field(default_factory=list)
    text: str = ""
    variables: dict[str, Any] = field(default_factory=dict)

    def fork(self) -> Plain:
        return Plain(self.engine, list(self.parts), self.text, dict(self.variables))

    def add(self, text: str) -> None:
        self.text += text
        self.parts.append(text)

    def tokens(self) -> list[int]:
        tokens, open_ = [self.engine.tokenizer.bos], ""
        for part in [*self.parts, []]:
            if isinstance(part, str):
                open_ += part
            else:
                tokens += self.engine.tokenizer.encode(open_) + part
                open_ = ""
        return tokens

    async def gen(self, name: str, count: int) -> None:
        output = await self.engine.generate(self.tokens(), SamplingParams(max_tokens=count, temperature=0))
        kept = output.tokens[: output.kept]
        said = self.engine.tokenizer.decode(kept)
        self.parts += [kept, output.text[len(said) :]]
        self.text += output.text
        self.variables[name] = output.text

    async def select(self, name: str, choices: Sequence[str]) -> None:
        tokens = self.tokens()
        scores = []
        for choice in choices:
            with self.engine.open(tokens) as sequence:
                scored = await sequence.append_scored(self.engine.tokenizer.encode(choice))
                scores.append(sum(r.logprob for r in scored) / len(scored))
        choice = choices[scores.index(max(scores))]
        self.add(choice)
        self.variables[name] = choice


class Odd(Exception):
    """What the executor says by `ProgramError`: which variable, None if code failed."""

    def __init__(self, variable: str | None) -> None:
        self.variable = variable
