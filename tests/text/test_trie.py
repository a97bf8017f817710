"""The trie against a dictionary that tries every length, and its cost on long texts."""

from __future__ import annotations

import time
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weft.runtime.text.trie import TextTrie

LIMIT = 6
# Few letters, so that texts share beginnings; astral and combining characters, since labels are cut between them.
TEXTS = st.text("ab🙂", max_size=8) | st.sampled_from(["", "a" * 30, "a" * 29 + "b", "e\u0301", "e"])


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.trie: TextTrie[int] = TextTrie(LIMIT)
        self.model: OrderedDict[str, int] = OrderedDict()
        self.count = 0

    @rule(text=TEXTS)
    def put(self, text: str) -> None:
        self.count += 1
        fallen = self.trie.put(text, self.count)
        self.model[text] = self.count
        self.model.move_to_end(text)
        expected = [self.model.popitem(last=False)[1]] if len(self.model) > LIMIT else []
        assert fallen == expected

    @rule(text=TEXTS)
    def longest_prefix(self, text: str) -> None:
        lengths = [len(key) for key in self.model if text.startswith(key)]
        if not lengths:
            assert self.trie.longest_prefix(text) is None
            return
        key = text[: max(lengths)]
        assert self.trie.longest_prefix(text) == (len(key), self.model[key])
        self.model.move_to_end(key)

    @rule(text=TEXTS)
    def prefixes(self, text: str) -> None:
        held = sorted((key for key in self.model if text.startswith(key)), key=len, reverse=True)
        assert list(self.trie.prefixes(text)) == [(len(key), self.model[key]) for key in held]

    @rule(text=TEXTS)
    def get(self, text: str) -> None:
        assert self.trie.get(text) == self.model.get(text)

    @rule(text=TEXTS)
    def remove(self, text: str) -> None:
        if text in self.model:
            assert self.trie.remove(text) == self.model.pop(text)
        else:
            with pytest.raises(KeyError):
                self.trie.remove(text)

    @invariant()
    def same(self) -> None:
        self.trie.check()
        assert list(self.trie.values()) == list(self.model.values())
        assert len(self.trie) == len(self.model)


test_against_a_dictionary = Model.TestCase


@given(texts=st.lists(TEXTS, unique=True, max_size=12), data=st.data())
def test_nothing_is_left_when_all_is_removed(texts: list[str], data: st.DataObject) -> None:
    trie: TextTrie[str] = TextTrie(100)
    for text in texts:
        trie.put(text, text)
    for text in data.draw(st.permutations(texts)):
        assert trie.remove(text) == text
        trie.check()
    assert not trie._root.children


def seconds(length: int) -> float:
    """A conversation of this many characters, remembered after every hundredth of it and looked up whole."""
    text = "".join(chr(0x4E00 + i * i % 5000) for i in range(length))
    turns = [text[: length * i // 100] for i in range(1, 101)]
    trie: TextTrie[int] = TextTrie(1000)
    start = time.process_time()
    for i, turn in enumerate(turns):
        trie.put(turn, i)
        trie.put(turn[:-1] + "!", i)  # splits the last edge
    for turn in turns:
        assert trie.longest_prefix(turn + "?") == (len(turn), turns.index(turn))
    return time.process_time() - start


def test_time_is_linear_in_the_text() -> None:
    """16 times the text in far less than 256 times the time; at 1.6 M characters it is still no wait."""
    short = min(seconds(100_000) for _ in range(3))
    long = min(seconds(1_600_000) for _ in range(2))
    assert long < 64 * max(short, 0.002)
