"""The vocabulary of the made dialogues, and the rule that splits it.

A name, a made word, a number of three digits or more, a pair of operands and a list each have a key; the CRC-32 of
the key decides whether it belongs to the held-out split (one in eight) or to the train split. Names and words of
both splits are made of the same syllables, numbers of the same digits, so that held-out ones can be read and
written by a model that has never met them. Times tables, the items of lists and single attributes are shared:
they are knowledge, not values.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "heldout"]

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"
FINALS = ("", "l", "m", "n", "r", "s")
SYLLABLES = tuple(c + v + f for f in FINALS for c in CONSONANTS for v in VOWELS)

# What stands in lists and fields, always a value: never a word of a phrase.
ITEMS = tuple(
    """apple pear plum fig lemon bean corn rice bread cup bowl fork spoon chair lamp bell drum coin stone shell
    ring rope boat cart wheel brick nail hat coat sock glove bird fish frog duck goat horse cat dog cow hen
    pig fox bee ant rose leaf tree root seed nut egg cake soup salt milk tea book pen key box bag desk door
    map card ball flag pot jar fan kite clock gem mug hut web lid""".split()  # noqa: SIM905
)
COLORS = ("red", "blue", "green", "white", "black", "brown", "pink", "gray")
VALUES = frozenset((*ITEMS, *COLORS, "yes", "no"))

# Attributes of a person, by what their values are.
NUMBERED = ("code", "room", "age", "seat", "score", "size", "weight", "price")
NAMED = ("city", "friend", "boss", "street", "team", "school", "hotel", "ship")
ATTRIBUTES = (*NUMBERED, *NAMED, "color", "pet")
PEOPLE = ("friend", "boss")  # whose value is a person, who has attributes too
THINGS = tuple(attribute for attribute in ATTRIBUTES if attribute not in PEOPLE)


def heldout(key: str) -> bool:
    """Whether what the key names belongs to the held-out split."""
    return zlib.crc32(key.encode()) % 8 == 0


def number_key(number: int) -> str:
    return f"number {number}"


def pair_key(left: int, right: int) -> str:
    """Of two operands, in either order and under any operator."""
    return f"pair {min(left, right)} {max(left, right)}"


class Draw:
    """Random choices for one example of one split. Names and made words of one example are all different."""

    def __init__(self, split: Split, rng: random.Random) -> None:
        self.split = split
        self.rng = rng
        self._held = split == "heldout"
        self._used: set[str] = set()

    def belongs(self, key: str) -> bool:
        return heldout(key) == self._held

    def name(self) -> str:
        return self.word().capitalize()

    def word(self) -> str:
        """Two syllables, now and then three."""
        while True:
            word = "".join(self.rng.choices(SYLLABLES, k=3 if self.rng.random() < 0.2 else 2))
            if word not in self._used and self.belongs(word):
                self._used.add(word)
                return word

    def number(self, digits: int = 0) -> int:
        """Of so many digits; by default two to four. Those of one or two digits are in both splits."""
        digits = digits or self.rng.choice((2, 3, 3, 4))
        while True:
            number = self._operand(digits)
            if digits < 3 or self.belongs(number_key(number)):
                return number

    def pair(self, left: int, right: int) -> tuple[int, int]:
        """Operands of so many digits each."""
        while True:
            numbers = self._operand(left), self._operand(right)
            if self.belongs(pair_key(*numbers)):
                return numbers

    def _operand(self, digits: int) -> int:
        return self.rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    def value(self, attribute: str) -> str:
        """A value that the attribute can have."""
        if attribute in NUMBERED:
            return str(self.number(2 if attribute == "age" else 3 if self.rng.random() < 0.7 else 4))
        if attribute in NAMED:
            return self.name()
        return self.rng.choice(COLORS if attribute == "color" else ITEMS)

    def attributes(self, count: int, kinds: Sequence[str] = ATTRIBUTES) -> list[str]:
        return self.rng.sample(kinds, count)

    def phrase(self, train: Sequence[str], held: Sequence[str]) -> str:
        """A template of this split."""
        return self.rng.choice(held if self._held else train)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability
