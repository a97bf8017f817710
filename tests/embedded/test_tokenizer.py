"""The embedded model's tokenizer.json."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.runtime.embedded.data import TOOL_TASKS, make
from weft.runtime.embedded.encoding import encode
from weft.runtime.embedded.make_tokenizer import FILE, SIZE
from weft.runtime.embedded.make_tokenizer import make as make_tokenizer
from weft.runtime.embedded.words import ATTRIBUTES, COLORS, ITEMS, SYLLABLES
from weft.runtime.text.tokenizer import Tokenizer
from weft.runtime.text.tokens import LEADING, TRAILING, USER

TOKENIZER = Tokenizer.load(FILE)
MADE = st.lists(st.sampled_from(SYLLABLES), min_size=2, max_size=3).map("".join)
SINGLE = st.sampled_from([*ITEMS, *COLORS, *ATTRIBUTES, "yes", "no"])
VALUE = MADE | MADE.map(str.capitalize) | SINGLE | st.integers(0, 99_999).map(str)
# What stands before and behind a value in facts, JSON, tables, calls, lists and answers.
PLACES = [
    ("", ""),
    ("The code of Bolan is ", "."),
    ("The code of ", " is 12."),
    ("Bolan: code ", ".\n"),
    ('{"name": "', '", "age": 12}'),
    ('{"name": "Bolan", "city": "', '"}'),
    ('[{"name": "Bolan", "code": ', ', "age": 12},\n'),
    ("name | code\nBolan | ", " | 12\n"),
    ("name|code\n", "|12"),
    ('parameter name="name" string="true">', "</"),
    ("<tool_result>", "</tool_result>"),
    ("Sort these words: pear, ", ", fig"),
    ("A) ", "\nB) 12"),
    ("Use get_code: ", ""),
    ('"', '"'),
    ("x/", "-y"),
]


def test_it_is_the_one_that_the_script_makes() -> None:
    assert FILE.read_text() == make_tokenizer()


def test_its_ids() -> None:
    assert TOKENIZER.size == SIZE == 2048
    assert [TOKENIZER.encode(token) for token in LEADING] == [[0], [1], [2]]
    first = SIZE - len(TRAILING)
    assert [TOKENIZER.encode(token) for token in TRAILING] == [[first + i] for i in range(len(TRAILING))]
    assert sorted(json.loads(FILE.read_text())["model"]["vocab"].values()) == list(range(SIZE))


@given(st.text() | st.text('ab 1{}"\n<|', max_size=20))
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_plain(text)) == text


def test_every_byte_has_a_token() -> None:
    assert {TOKENIZER.token_bytes(id) for id in range(SIZE)} >= {bytes([byte]) for byte in range(256)}


@given(value=VALUE, place=st.sampled_from(PLACES))
def test_a_value_has_the_same_tokens_wherever_it_stands(value: str, place: tuple[str, str]) -> None:
    before, behind = place
    tokens = TOKENIZER.encode(before + value + behind)
    own = TOKENIZER.encode(value)
    begin = next(i for i in range(len(tokens)) if TOKENIZER.decode(tokens[:i]) == before)
    assert tokens[begin : begin + len(own)] == own


def test_a_number_is_its_digits() -> None:
    assert len(TOKENIZER.encode("1203958")) == 7


@pytest.mark.parametrize("word", [*ITEMS, *COLORS, *ATTRIBUTES, "yes", "no", "name", "calculator"])
def test_fixed_values_are_single_tokens(word: str) -> None:
    assert len(TOKENIZER.encode(word)) == 1


def test_syllables_are_single_tokens() -> None:
    cut = [s for syllable in SYLLABLES for s in (syllable, syllable.capitalize()) if len(TOKENIZER.encode(s)) > 1]
    assert cut == []


def test_declared_tools_cost_little() -> None:
    """The layout's text about tools has 1,100 characters; each of its parts is one token."""
    (user,) = TOKENIZER.encode(USER)
    for task in TOOL_TASKS:
        example = make(task, "train", random.Random(0))
        assert encode(TOKENIZER, example).tokens.index(user) < 55 + 20 * len(example.tools)
