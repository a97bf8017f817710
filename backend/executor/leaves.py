"""The expressions that a state works off, one by one: sglang's, and the executor's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sglang as sgl
from sglang.lang import ir

from weft.runtime.decoding.params import Grammar
from weft.runtime.errors import RequestError


class Plain(ir.SglExpr):
    """Text in which nothing is a special token, whatever it spells: what tools and users say."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value


class Compute(ir.SglExpr):
    """Have the engine compute the text so far."""


class Held(ir.SglGen):
    """A generation that is held to a grammar sglang has no argument for. sampling: as for `sgl.gen`."""

    def __init__(self, name: str, grammar: Grammar | None, **sampling: Any) -> None:
        self.__dict__.update(vars(sgl.gen(name, **sampling)))
        self.grammar = grammar


def leaves(expression: Any) -> Iterator[ir.SglExpr]:
    """The expressions of a list of lists of expressions, in order."""
    if isinstance(expression, str):
        expression = ir.SglConstantText(expression)
    if isinstance(expression, ir.SglExprList):
        for own in expression.expr_list:
            yield from leaves(own)
    elif isinstance(expression, ir.SglExpr):
        if not isinstance(expression, ir.SglCommitLazy):
            yield expression
    else:
        raise RequestError("expression", expression, "must be text or an expression of sglang")


def generated(expression: Any) -> list[Any]:
    """Of an expression, what makes variables."""
    return [own for own in leaves(expression) if isinstance(own, ir.SglGen | ir.SglSelect)]


def names(leaf: ir.SglExpr) -> list[str]:
    """Variables that an expression will set."""
    if isinstance(leaf, ir.SglSeparateReasoning):
        return [f"{own.name}_reasoning_content" for own in generated(leaf.expr)]
    if isinstance(leaf, ir.SglGen | ir.SglSelect | ir.SglVarScopeBegin):
        return [leaf.name] if leaf.name is not None else []
    return []


def separated(model_type: str, text: str) -> tuple[str, str]:
    """Reasoning and answer, by sglang's own parser."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser  # heavy, and seldom asked for

    reasoning, answer = ReasoningParser(model_type).parse_non_stream(text)
    return reasoning, answer
