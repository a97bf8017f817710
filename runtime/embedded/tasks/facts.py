"""Questions about facts in the prompt: recall, two hops, multiple choice, judging."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from weft.runtime.embedded.dialogue import Dialogue
from weft.runtime.embedded.tasks.arithmetic import compute, operation, working
from weft.runtime.embedded.words import ATTRIBUTES, ITEMS, NAMED, PEOPLE, THINGS, Draw

FACTS = (
    "The {a} of {x} is {v}.",
    "{x} has the {a} {v}.",
    "{x}: {a} {v}.",
    "Note: the {a} of {x} is {v}.",
    "For {x} the {a} is {v}.",
    "Here the {a} for {x} is {v}.",
)
_HELD_FACTS = ("Note: {x} has the {a} {v}.", "Note: for {x} the {a} is {v}.", "The {a} for {x} is {v}.")
QUESTIONS = (
    "What is the {a} of {x}?",
    "Give the {a} of {x}.",
    "Which {a} does {x} have?",
    "Tell me the {a} of {x}.",
    "{a} of {x}?",
    "I need the {a} of {x}.",
    "Find the {a} of {x}.",
    "Please say which {a} {x} has.",
    "What {a} has {x}?",
    "Say which {a} {x} has.",
    "Please tell me the {a} of {x}.",
    "I need the {a} that {x} has.",
)
HELD_QUESTIONS = ("Tell me which {a} {x} has.", "Please give me the {a} of {x}.", "What {a} does {x} have?")
_FILLER = (
    "{x} has a {i} and a {j}.",
    "There is a {i} near the {j}.",
    "{x} gives the {i} away.",
    "The {i} is with {x}.",
    "{x} needs a {i} now.",
)
_HELD_FILLER = ("There is a {i} with {x}.", "{x} gives a {i} away.", "The {i} is near the {j}.")
_HOPS = (
    "What is the {a} of the {r} of {x}?",
    "Give the {a} of the {r} of {x}.",
    "Which {a} does the {r} of {x} have?",
    "Tell me the {a} of the {r} of {x}.",
    "Find the {r} of {x} and give the {a} of that one.",
    "Say which {a} the {r} of {x} has.",
    "I need the {a} that the {r} of {x} has.",
    "What {a} does the {r} of {x} have?",
    "Which {a} has the {r} of {x}?",
    "Please say what the {a} of the {r} of {x} is.",
    "Please find the {a} of the {r} of {x}.",
    "{a} of the {r} of {x}?",
    "Tell me what {a} the {r} of {x} has.",
    "Of the {r} of {x} give me the {a}.",
)
_HELD_HOPS = ("Please give me the {a} of the {r} of {x}.", "Tell me which {a} the {r} of {x} has.")
_JUDGED = (
    "Is it right that the {a} of {x} is {v}? Answer yes or no.",
    "The {a} of {x} is {v}. Right? Answer yes or no.",
    "I say the {a} of {x} is {v}. Is that right? yes or no",
    "Is the {a} of {x} {v}? Answer yes or no.",
    "Does {x} have the {a} {v}? yes or no",
    "{x} has the {a} {v}. Is that right? Answer yes or no.",
    "Is it right that {x} has {v} as the {a}? Answer yes or no.",
    "I say for {x} the {a} is {v}. Right? yes or no",
)
_HELD_JUDGED = (
    "I say {x} has the {a} {v}. Is that right? Answer yes or no.",
    "Is it right that {x} has the {a} {v}? yes or no",
)
_JUDGED_SUMS = (
    "Is {e} right? Answer yes or no.",
    "I say {e}. Is that right? yes or no",
    "{e}. Right? Answer yes or no.",
    "Is it right that {e}? Answer yes or no.",
    "Is this right: {e}? Answer yes or no.",
    "Is this right? {e} yes or no",
    "Tell me: is {e} right? yes or no",
    "{e}. Is that right? yes or no",
)
_HELD_JUDGED_SUMS = ("Is that right: {e}? yes or no", "I say {e}. Right? Answer yes or no.")
_FOLLOW_UP = ("I say it is {v}. Is that right? yes or no", "Is it {v}? Answer yes or no.")
_HELD_FOLLOW_UP = ("Is that {v}? yes or no", "I say {v}. Is that right? Answer yes or no.")
_OPTIONS = (
    "{q}\n{o}\nAnswer with a letter.",
    "{q} Give the letter.\n{o}",
    "{q}\n{o}\nLetter?",
    "{q}\n{o}",
    "{q} Answer with one letter.\n{o}",
    "{q}\n{o}\nGive one letter.",
    "{q}\n{o}\nTell me the letter.",
    "{q} Give one letter.\n{o}",
)
_HELD_OPTIONS = ("{q}\n{o}\nGive the letter.", "{q} Answer with a letter.\n{o}")

_WHICH = ("Which is {v}?", "Find {v}.", "{v}?", "Tell me which is {v}.")
_HELD_WHICH = ("Please find {v}.", "Which has {v}?")


class Fact(NamedTuple):
    name: str
    attribute: str
    value: str

    def __str__(self) -> str:
        return FACTS[0].format(a=self.attribute, x=self.name, v=self.value)


# A small word with its space, a name's first syllable, its others, a digit, anything else.
_PIECE = re.compile(r" ?\b[a-z]+|[A-Z][^aeiou\W]?[aeiou]?|[aeiou]|\d|[^\w]")


def cost(text: str) -> int:
    """About how many tokens a text is."""
    return len(_PIECE.findall(text))


def facts(draw: Draw, count: int, attribute: str | None = None) -> list[Fact]:
    """With a name each that no other has; values may come twice."""
    found = []
    for _ in range(count):
        kind = attribute or draw.rng.choice(ATTRIBUTES)
        found.append(Fact(draw.name(), kind, draw.value(kind)))
    return found


def say(draw: Draw, fact: Fact) -> str:
    return draw.phrase(FACTS, _HELD_FACTS).format(a=fact.attribute, x=fact.name, v=fact.value)


def question(draw: Draw, fact: Fact) -> str:
    return draw.phrase(QUESTIONS, HELD_QUESTIONS).format(a=fact.attribute, x=fact.name)


def _other(draw: Draw) -> str:
    """A sentence that says nothing about an attribute, with a name of its own."""
    i, j = draw.rng.sample(ITEMS, 2)
    return draw.phrase(_FILLER, _HELD_FILLER).format(x=draw.name(), i=i, j=j)


def _filler(draw: Draw, tokens: int, avoid: Sequence[str]) -> list[str]:
    """About so many tokens of facts and other sentences, with none of the values to avoid."""
    sentences: list[str] = []
    while tokens > 0:
        if draw.chance(0.3):
            sentence = _other(draw)
        else:
            (fact,) = facts(draw, 1)
            sentence = say(draw, fact)
            if fact.value in avoid:
                continue
        if any(f" {value} " in f"{sentence[:-1]} " for value in avoid):
            continue
        sentences.append(sentence)
        tokens -= cost(sentence) + 1  # an attribute and the space before it are two
    return sentences


def recall(d: Dialogue, tokens: int | None) -> None:
    """The fact of the first question stands at the beginning, those of later ones anywhere."""
    draw = d.draw
    room = int(16 * (20 ** draw.rng.random())) if tokens is None else tokens - 50
    count = 1 if draw.chance(0.2) else draw.rng.randint(2, 2 + max(0, min(room // 100, 8)))
    asked: list[Fact] = []
    while len(asked) < count:
        (fact,) = facts(draw, 1)
        if fact.value not in (other.value for other in asked):
            asked.append(fact)
    room -= sum(cost(str(fact)) + 16 for fact in asked[1:])
    texts = _filler(draw, room, [fact.value for fact in asked])
    for fact in asked[1:]:
        texts.insert(draw.rng.randint(0, len(texts)), say(draw, fact))
    d.context(" ".join([say(draw, asked[0]), *texts]))
    for fact in asked:
        d.ask(question(draw, fact), fact.value, str(fact))


def recall_later(d: Dialogue, interlude: Callable[[], None]) -> None:
    """The question comes turns after the facts. Values are names, which no turn between them can repeat."""
    draw = d.draw
    known = [fact for _ in range(draw.rng.randint(1, 4)) for fact in facts(draw, 1, draw.rng.choice(NAMED))]
    d.context(" ".join(say(draw, fact) for fact in known))
    for fact in draw.rng.sample(known, min(len(known), draw.rng.randint(1, 2))):
        interlude()
        d.ask(question(draw, fact), fact.value, str(fact))


def two_hop(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    relation, attribute = draw.rng.choice(PEOPLE), draw.rng.choice(THINGS)
    pairs = []
    for _ in range(draw.rng.randint(2, 4)):
        first = Fact(draw.name(), relation, draw.name())
        pairs.append((first, Fact(first.value, attribute, draw.value(attribute))))
    texts = [say(draw, fact) for pair in pairs for fact in pair]
    # Only the last turn of a dialogue thinks, and two hops in the head are hard.
    asked = 1 if d.thinking else draw.rng.randint(1, 2 if tokens is None else len(pairs))
    if tokens is not None:
        texts += _filler(draw, tokens - 60 - 20 * asked - sum(map(cost, texts)), [])
    draw.rng.shuffle(texts)
    d.context(" ".join(texts))
    for first, second in draw.rng.sample(pairs, asked):
        text = draw.phrase(_HOPS, _HELD_HOPS).format(a=attribute, r=relation, x=first.name)
        d.ask(text, second.value, f"{first} {second}")


def multiple_choice(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    attribute = draw.rng.choice(ATTRIBUTES)
    known: list[Fact] = []
    while len(known) < 4:
        (fact,) = facts(draw, 1, attribute)
        if fact.value not in (other.value for other in known):
            known.append(fact)
    stated = known[: draw.rng.randint(1, 4)]
    # To find the letter of a value is learnt late; it comes sooner where the question gives the value.
    given = draw.chance(0.3)
    if not given:
        d.context(" ".join(say(draw, fact) for fact in stated))
    for fact in draw.rng.sample(stated, min(len(stated), draw.rng.choice((1, 1, 2)))):
        values = [other.value for other in known]
        draw.rng.shuffle(values)
        options = "\n".join(f"{letter}) {value}" for letter, value in zip("ABCD", values, strict=True))
        letter = "ABCD"[values.index(fact.value)]
        asked = draw.phrase(_WHICH, _HELD_WHICH).format(v=fact.value) if given else question(draw, fact)
        text = draw.phrase(_OPTIONS, _HELD_OPTIONS).format(q=asked, o=options)
        found = f"{letter}) {fact.value}"
        d.ask(text, letter, found if given else f"{fact} {found}")


def judge(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    kind = draw.rng.random()
    if kind < 0.5:
        (_judge_sum if kind < 0.3 else _judge_same)(d)
        return
    attribute = draw.rng.choice(ATTRIBUTES)
    known = facts(draw, draw.rng.randint(1, 4), attribute)
    d.context(" ".join(say(draw, fact) for fact in known))
    for fact in draw.rng.sample(known, min(len(known), draw.rng.choice((1, 1, 2)))):
        claimed = fact.value if draw.chance(0.5) else _wrong(draw, fact, known)
        text = draw.phrase(_JUDGED, _HELD_JUDGED).format(a=attribute, x=fact.name, v=claimed)
        d.ask(text, yes(claimed == fact.value), f"{fact} {claimed} = {fact.value}")


def _judge_same(d: Dialogue) -> None:
    """Two values side by side, as the thoughts about other claims put them."""
    draw = d.draw
    (fact,) = facts(draw, 1)
    claimed = fact.value if draw.chance(0.5) else _wrong(draw, fact, ())
    both = f"{claimed} = {fact.value}"
    d.ask(draw.phrase(_JUDGED_SUMS, _HELD_JUDGED_SUMS).format(e=both), yes(claimed == fact.value), both)


def _judge_sum(d: Dialogue) -> None:
    draw = d.draw
    a, sign, b = operation(draw, draw.rng.choice((0, 1, 2)))
    result = compute(a, sign, b)
    claimed = result if draw.chance(0.5) else abs(result + draw.rng.choice((-10, -2, -1, 1, 2, 10)))
    text = draw.phrase(_JUDGED_SUMS, _HELD_JUDGED_SUMS).format(e=f"{a} {sign} {b} = {claimed}")
    d.ask(text, yes(claimed == result), f"{working(a, sign, b)}. {claimed} = {result}")


def follow_up(d: Dialogue, fact: Fact, others: Sequence[str]) -> None:
    """A claim about the answer just given."""
    wrong = [value for value in others if value != fact.value]
    claimed = d.draw.rng.choice(wrong) if wrong and d.draw.chance(0.5) else fact.value
    task, d.task = d.task, "judge"
    d.ask(
        d.draw.phrase(_FOLLOW_UP, _HELD_FOLLOW_UP).format(v=claimed),
        yes(claimed == fact.value),
        f"{fact} {claimed} = {fact.value}",
    )
    d.task = task


def _wrong(draw: Draw, fact: Fact, known: Sequence[Fact]) -> str:
    others = [other.value for other in known if other.value != fact.value]
    while True:
        value = draw.rng.choice(others) if others and draw.chance(0.6) else draw.value(fact.attribute)
        if value != fact.value:
            return value


def yes(right: bool) -> str:
    return "yes" if right else "no"
