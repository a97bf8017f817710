"""Makes the embedded model's tokenizer.json: a byte-level BPE over the train split, with V4's special tokens.

    python -m weft.runtime.embedded.make_tokenizer [FILE]

Text is cut before any merge: the layout's own sentences and tags are one piece each; a word that phrasings use
takes the space before it; everything that can be a value (names, made words, items, digits) is cut the same way
wherever it stands, in syllables and single digits, and never together with a space, quote, bar or brace. So a
value has the same tokens in a fact, a JSON string, a table, a call and an answer.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from weft.runtime.embedded import data
from weft.runtime.embedded.encoding import frame, segments
from weft.runtime.embedded.words import ATTRIBUTES, SYLLABLES, VALUES
from weft.runtime.text.tokens import LEADING, TRAILING

SIZE = 2048
FILE = Path(__file__).parent / "weights" / "tokenizer.json"
_EXAMPLES = 6000
_COMMON = 8  # a word of so many examples belongs to a phrasing, as names do not

# What the layout and JSON put around values, each a piece of its own.
_TAGS = (
    "tool_calls>\n<",
    "tool_calls>",
    'invoke name="',
    "invoke>\n</",
    'parameter name="',
    '" string="true">',
    '" string="false">',
    "parameter>\n</",
    "parameter>\n<",
    '">\n<',
    "<tool_result>",
    "</tool_result>",
    '{"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string"}}, "required": ["',
    '"]}}',
    '": "',
    '", "',
    '": ',
    ', "',
    '{"',
    '"}',
    ", ",
    " | ",
)
_SYLLABLE = "[B-DF-HJ-NP-TV-Zb-df-hj-np-tv-z]?[aeiou](?:[lmnrs](?![aeiou]))?"


_NEVER_GLUED = frozenset((*VALUES, *ATTRIBUTES, "name", "I"))


def make() -> str:
    """The text of tokenizer.json; the same bytes every time.

    Every piece counts once, however often it occurs: new numbers of examples or new phrasings of the same words
    change nothing.
    """
    words, glued = _words(_corpus())
    literals = _literals()
    plain = _pattern(words, glued, ())
    pieces = sorted({*words, *(f" {word}" for word in glued), *SYLLABLES, *map(str.capitalize, SYLLABLES)})
    base = _backend(plain, {}, [])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, min_frequency=1, initial_alphabet=_alphabet(), show_progress=False
    )
    base.train_from_iterator(pieces, trainer)
    merges = [tuple(pair) for pair in json.loads(base.to_str())["model"]["merges"]]
    for count in range(len(merges), 0, -1):
        joined = _joins(literals, merges[:count])
        if len(LEADING) + len(TRAILING) + 256 + count + len(joined) <= SIZE:
            break
    return _with_specials(_pattern(words, glued, literals), [*merges[:count], *joined])


def _corpus() -> Iterator[list[str]]:
    """The texts of each example."""
    for i in range(_EXAMPLES):
        example = data.make(data.TASKS[i % len(data.TASKS)], "train", random.Random(f"tokenizer {i}"))
        yield [text for text, control in segments(example) if not control]


def _words(examples: Iterable[list[str]]) -> tuple[list[str], list[str]]:
    """Those of phrasings and the values of fixed lists, and of the former those that follow a space."""
    counts = Counter(word for texts in examples for word in set(re.findall(" ?[A-Za-z]+", "\n".join(texts))))
    common = {word for word, count in counts.items() if count >= _COMMON and len(word.lstrip()) > 1}
    glued = {word[1:] for word in (*common, " a") if word[0] == " "} - _NEVER_GLUED
    alone = {word for word in common if word[0] != " "} | VALUES | {*ATTRIBUTES}
    return sorted(alone), sorted(glued)


def _literals() -> list[str]:
    found = {text for system in (False, True) for part in frame(system) for text, control in part if not control}
    return sorted({*found, *_TAGS}, key=lambda text: (-len(text), text))


def _pattern(words: Sequence[str], glued: Sequence[str], literals: Sequence[str]) -> str:
    fixed = [re.escape(text) for text in literals]
    spaced = f" (?:{_any(glued)})(?![A-Za-z])"
    alone = f"(?<![A-Za-z])(?:{_any(words)})(?![A-Za-z])"
    return "|".join((*fixed, spaced, alone, _SYLLABLE, r"\n\n|[\s\S]"))


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


def _alphabet() -> list[str]:
    alphabet: list[str] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return sorted(alphabet)


def _backend(pattern: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Ids as in V4: BOS, EOS and PAD first, then bytes and merges, then the other specials."""
    tokens = [*LEADING, *_alphabet(), *(left + right for left, right in merges), *TRAILING]
    return {token: id for id, token in enumerate(tokens)}


def _joins(literals: list[str], merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """More merges, which make each literal one token: again the most frequent pair first. A literal is one piece,
    so the merges of words are applied to it across its words.
    """
    backend = _backend(r"[\s\S]+", _vocabulary(merges), merges)
    lines = [backend.encode(text).tokens for text in literals]
    joined: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for line in lines for pair in itertools.pairwise(line))
        if not pairs:
            return joined
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        joined.append(best)
        lines = [_merged(line, best) for line in lines]


def _merged(line: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for token in line:
        if result and (result[-1], token) == pair:
            result[-1] += token
        else:
            result.append(token)
    return result


def _with_specials(pattern: str, merges: list[tuple[str, str]]) -> str:
    backend = _backend(pattern, _vocabulary(merges), merges)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (*LEADING, *TRAILING)])
    text: str = backend.to_str()
    return text


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(make())
