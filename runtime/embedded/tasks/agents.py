"""Calling lookup tools: the right one, and several one after another."""

from __future__ import annotations

from weft.runtime.embedded.dialogue import Dialogue, tool
from weft.runtime.embedded.tasks.arithmetic import CALCULATOR, compute
from weft.runtime.embedded.tasks.facts import HELD_QUESTIONS, QUESTIONS, Fact
from weft.runtime.embedded.words import NUMBERED, PEOPLE, THINGS

_TOOL = ("Look up the {a}.", "Get the {a}.", "Find the {a}.")
_CHAINS = (
    "Find the {c} of {x}.",
    "What is the {c} of {x}?",
    "Look up the {c} of {x}.",
    "I need the {c} of {x}.",
    "Tell me the {c} of {x}.",
    "Now find and tell me the {c} of {x}.",
)
_HELD_CHAINS = ("Look up and tell me the {c} of {x}.", "Please find the {c} of {x}.")
_THEN = (" Then add {n}.", " Add {n} to it.", " Then compute that + {n}.")
_HELD_THEN = (" Then add {n} to it.", " Compute that + {n}.")


def _declare(d: Dialogue, attributes: list[str]) -> None:
    d.tools += [tool(f"get_{a}", d.draw.rng.choice(_TOOL).format(a=a), "name") for a in attributes]
    d.draw.rng.shuffle(d.tools)


def _look_up(d: Dialogue, fact: Fact, reasoning: str) -> None:
    d.data.setdefault(f"get_{fact.attribute}", {})[fact.name] = fact.value
    d.call(f"get_{fact.attribute}", {"name": fact.name}, fact.value, reasoning)


def route(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    while True:
        attributes = draw.attributes(draw.rng.randint(2, 5))
        if draw.belongs("tools " + " ".join(sorted(attributes))):
            break
    if draw.chance(0.3):
        d.tools.append(CALCULATOR)
    _declare(d, attributes)
    for _ in range(draw.rng.choice((1, 1, 2, 3))):
        kind = draw.rng.choice(attributes)
        fact = Fact(draw.name(), kind, draw.value(kind))
        d.user(draw.phrase(QUESTIONS, HELD_QUESTIONS).format(a=kind, x=fact.name))
        _look_up(d, fact, f"Use get_{kind}: {fact.name}")
        d.answer(fact.value, f"The {kind} is {fact.value}.")


def plan_act(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    steps = draw.rng.choice((2, 2, 3, 4))
    summed = steps > 2 and draw.chance(0.5)
    lookups = steps - 1 if summed else steps
    last = draw.rng.choice(NUMBERED if summed else THINGS)
    chain = [*draw.rng.choices(PEOPLE, k=lookups - 1), last]
    spare = draw.rng.choice([a for a in THINGS if a != last])
    d.tools = [CALCULATOR] if summed or draw.chance(0.3) else []
    _declare(d, [*PEOPLE, last, *([spare] if draw.chance(0.5) else [])])
    number = draw.rng.randint(1, 20)
    text = " of the ".join(reversed(chain))
    name = draw.name()
    then = draw.phrase(_THEN, _HELD_THEN).format(n=number) if summed else ""
    d.user(draw.phrase(_CHAINS, _HELD_CHAINS).format(c=text, x=name) + then)
    plan = "Plan: " + ", ".join([*chain, *([f"+ {number}"] if summed else [])]) + "."
    for i, attribute in enumerate(chain):
        fact = Fact(name, attribute, draw.value(attribute))
        reasoning = plan if i == 0 else f"The {chain[i - 1]} is {name}. Next: {attribute}."
        _look_up(d, fact, reasoning)
        name = fact.value
    if summed:
        expression = f"{name} + {number}"
        result = str(compute(int(name), "+", number))
        d.call("calculator", {"expression": expression}, result, f"The {last} is {name}. Next: + {number}.")
        name = result
    d.answer(name, f"The result is {name}.")
