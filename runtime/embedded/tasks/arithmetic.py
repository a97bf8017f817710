"""Sums, in the head and through a calculator."""

from __future__ import annotations

from weft.runtime.embedded.dialogue import Dialogue, tool
from weft.runtime.embedded.words import Draw

CALCULATOR = tool("calculator", "Compute.", "expression")

_SUMS = (
    "What is {e}?",
    "Compute {e}.",
    "{e} =",
    "Give the result of {e}.",
    "How much is {e}?",
    "Tell me what {e} is.",
    "Please compute {e}.",
    "{e}",
)
_HELD_SUMS = ("Please tell me how much {e} is.", "What is the result of {e}?", "Give me {e}.")
_MORE = ("Now add {n}.", "Add {n} to that.", "And {n} more?")
_HELD_MORE = ("Now {n} more?", "And add {n} to that.")
_CALLED = (
    "Compute {e}.",
    "What is {e}?",
    "Use the calculator: {e}",
    "How much is {e}?",
    "Please compute {e} with the calculator.",
    "I need the result of {e}.",
    "Give the exact result of {e}.",
)
_HELD_CALLED = ("Use the calculator to compute {e}.", "Please give me the exact result of {e}.", "I need {e}.")
_STORIES = {
    "+": (
        "{x} has {a} and then gets {b} more. How many now?",
        "There are {a} here and {b} there. How many in all?",
        "{x} has {a} and gets {b} more. How many in all?",
        "There are {a}. Then {x} gets {b} more. How many now?",
        "{x} gets {a} now and {b} then. How many in all?",
    ),
    "-": (
        "{x} has {a} and gives {b} away. How many now?",
        "Of {a} there are {b} gone. How many are left?",
        "There are {a}. {x} gives {b} away. How many now?",
        "{x} has {a} here. Then {b} are gone. How many are left?",
    ),
    "*": (
        "{x} has {a} bags with {b} each. How many in all?",
        "There are {a} rows with {b} each. How many in all?",
        "{x} has {a} bags here with {b} each. How many now?",
        "There are {a} bags with {b} each. How many are there?",
    ),
}
_HELD_STORIES = {
    "+": ("{x} gets {a} and then {b} more. How many in all?",),
    "-": ("There are {a} here. {x} gives {b} away. How many are left?",),
    "*": ("There are {a} bags here with {b} each. How many now?",),
}


def compute(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def working(left: int, sign: str, right: int) -> str:
    """The written working, from the last digit to the first."""
    result = compute(left, sign, right)
    if sign == "*" or result < 0:
        return f"{left} {sign} {right} = {result}"
    steps, carry, digits = [], 0, max(len(str(left)), len(str(right)))
    for i in range(digits):
        a, b = left // 10**i % 10, right // 10**i % 10
        total = a + b + carry if sign == "+" else a - b - carry
        steps.append(f"{a} {sign} {b}{f' {sign} 1' if carry else ''} = {total}")
        carry = int(total > 9 or total < 0)
    return ", ".join(steps) + f": {result}"


def operation(draw: Draw, digits: int = 0) -> tuple[int, str, int]:
    """A sum with a result of zero or more, by default one for the head."""
    sign = draw.rng.choices("+-*", (6, 4, 1.5))[0]
    if sign == "*" and not digits:
        return draw.rng.randint(2, 9), sign, draw.rng.randint(2, 9)
    left = digits or draw.rng.choices((1, 2, 3), (2, 5, 4))[0]
    right = draw.rng.choice((left, left, max(left - 1, 1)))
    a, b = draw.pair(left, right)
    return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)


def addition(d: Dialogue, tokens: int | None) -> None:
    a, sign, b = operation(d.draw)
    result = compute(a, sign, b)
    d.ask(d.draw.phrase(_SUMS, _HELD_SUMS).format(e=f"{a} {sign} {b}"), str(result), working(a, sign, b))
    while d.draw.chance(0.15):
        more = d.draw.rng.randint(1, 20)
        d.ask(d.draw.phrase(_MORE, _HELD_MORE).format(n=more), str(result + more), working(result, "+", more))
        result += more


def calculator(d: Dialogue, tokens: int | None) -> None:
    d.tools = [CALCULATOR]
    for _ in range(d.draw.rng.choice((1, 1, 2, 3))):
        a, sign, b = operation(d.draw, d.draw.rng.choice((2, 3, 3, 4, 5)))
        expression = f"{a} {sign} {b}"
        if d.draw.chance(0.3):
            story = d.draw.phrase(_STORIES[sign], _HELD_STORIES[sign])
            d.user(story.format(x=d.draw.name(), a=a, b=b))
        else:
            d.user(d.draw.phrase(_CALLED, _HELD_CALLED).format(e=expression))
        result = str(compute(a, sign, b))
        d.call("calculator", {"expression": expression}, result, f"Use calculator: {expression}")
        d.answer(result, f"The result is {result}.")
