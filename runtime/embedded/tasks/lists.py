"""Short lists: counting, sorting, copying."""

from __future__ import annotations

from weft.runtime.embedded.dialogue import Dialogue
from weft.runtime.embedded.words import ITEMS, Draw

_COUNT = (
    "How many times is {i} in this list? {l}",
    "Count {i} in the list: {l}",
    "{l}\nHow many times is {i} there?",
    "List: {l}\nCount {i}.",
    "Count how many times {i} is here: {l}",
    "Here is a list: {l}. Count {i} in it.",
    "{l}\nCount {i}.",
    "{l}\nHow many times is {i} in it?",
    "Here is a list: {l}. How many times is {i} there?",
    "{l}\nCount how many times {i} is in this list.",
)
_HELD_COUNT = ("Here is a list: {l}. How many times is {i} in it?", "{l}\nCount {i} in this list.")
_COUNT_ALL = (
    "How many words are in this list? {l}",
    "Count the words: {l}",
    "{l}\nHow many words are there?",
    "{l}\nCount the words.",
    "List: {l}\nHow many words?",
    "Count all words in the list: {l}",
    "Here is a list: {l}. How many words are in it?",
)
_HELD_COUNT_ALL = ("Count the words in this list: {l}", "List: {l}\nHow many words are in it?")
_SORT_WORDS = (
    "Sort these words: {l}",
    "Put these words in order: {l}",
    "{l}\nSort the words from a to z.",
    "Sort from a to z: {l}",
    "Give this list in order: {l}",
    "{l}\nPut these words in order.",
    "{l}\nSort from a to z.",
    "{l}\nGive the words in order.",
    "Please give the words in order: {l}",
    "Sort the words in this list: {l}",
    "{l}\nPut this list in order.",
)
_HELD_SORT_WORDS = ("Put the words in order from a to z: {l}", "{l}\nSort these words.")
_SORT_UP = (
    "Sort these numbers: {l}",
    "Put these numbers in order: {l}",
    "{l}\nSort from small to big.",
    "Sort from small to big: {l}",
    "Give these numbers from small to big: {l}",
    "{l}\nPut these numbers in order.",
    "{l}\nSort the numbers.",
    "{l}\nGive the numbers from small to big.",
    "Please give me the numbers from small to big: {l}",
    "Sort the numbers in this list: {l}",
)
_HELD_SORT_UP = ("Put these numbers in order from small to big: {l}", "{l}\nSort these numbers.")
_SORT_DOWN = (
    "Sort from big to small: {l}",
    "Give these numbers from big to small: {l}",
    "{l}\nSort from big to small.",
    "{l}\nGive the numbers from big to small.",
    "{l}\nPut these numbers in order from big to small.",
    "Please give me the numbers from big to small: {l}",
)
_HELD_SORT_DOWN = (
    "Put these numbers in order from big to small: {l}",
    "Sort these numbers from big to small: {l}",
)
_COPY = (
    "Copy this: {l}",
    "Repeat: {l}",
    "Say exactly this: {l}",
    "Repeat after me: {l}",
    "Write this again: {l}",
    "{l}\nRepeat that.",
    "Give this back: {l}",
)
_HELD_COPY = ("Repeat exactly this: {l}", "{l}\nCopy that.", "Say this again: {l}")


def count(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    while True:
        kinds = draw.rng.sample(ITEMS, draw.rng.randint(2, 4))
        items = draw.rng.choices(kinds, k=draw.rng.randint(3, 7))
        if draw.belongs("list " + " ".join(items)):
            break
    text = ", ".join(items)
    if draw.chance(0.25):
        running = ", ".join(f"{item} {i}" for i, item in enumerate(items, 1))
        d.ask(draw.phrase(_COUNT_ALL, _HELD_COUNT_ALL).format(l=text), str(len(items)), running)
        return
    for kind in draw.rng.sample(kinds, draw.rng.choice((1, 1, 2))):
        wanted = items.count(kind)
        # Counting aloud is no help: where to stop is the same question.
        d.ask(draw.phrase(_COUNT, _HELD_COUNT).format(l=text, i=kind), str(wanted), f"{kind} {wanted}")


def sort(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    size = draw.rng.randint(3, 7)
    if draw.chance(0.5):
        words = _words(draw, size)
        ordered = ", ".join(sorted(words))
        first = ", ".join(word[0] for word in sorted(words))
        d.ask(draw.phrase(_SORT_WORDS, _HELD_SORT_WORDS).format(l=", ".join(words)), ordered, f"{first}")
        return
    numbers = [draw.number(draw.rng.choice((1, 2, 2, 2, 3))) for _ in range(size)]
    while not draw.belongs("list " + " ".join(map(str, numbers))):
        draw.rng.shuffle(numbers)
        numbers[0] = draw.number(2)
    text = ", ".join(map(str, numbers))
    down = draw.chance(0.3)
    ordered = (" > " if down else " < ").join(map(str, sorted(numbers, reverse=down)))
    phrase = draw.phrase(_SORT_DOWN, _HELD_SORT_DOWN) if down else draw.phrase(_SORT_UP, _HELD_SORT_UP)
    d.ask(phrase.format(l=text), ", ".join(map(str, sorted(numbers, reverse=down))), ordered)


def _words(draw: Draw, size: int) -> list[str]:
    """Each with a first letter of its own."""
    words: dict[str, str] = {}
    while len(words) < size:
        word = draw.word()
        words.setdefault(word[0], word)
    return list(words.values())


def copy(d: Dialogue, tokens: int | None) -> None:
    draw = d.draw
    for _ in range(draw.rng.choice((1, 1, 2))):
        parts = [_part(draw) for _ in range(draw.rng.randint(2, 7))]
        text = draw.rng.choice((" ", " ", ", ", "-", "/")).join(parts)
        d.ask(draw.phrase(_COPY, _HELD_COPY).format(l=text), text, f'"{text}"')


def _part(draw: Draw) -> str:
    kind = draw.rng.random()
    if kind < 0.4:
        return draw.word()
    if kind < 0.7:
        return draw.name()
    return str(draw.number())
