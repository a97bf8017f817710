"""The made dialogues as documents for training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from weft.runtime.embedded.data import TASKS, WEIGHTS, mixture
from weft.runtime.embedded.rows import Document
from weft.runtime.embedded.words import Split
from weft.runtime.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parent / "weights" / "tokenizer.json"


def documents(
    split: Split, seed: int, longest: int, long: float, weights: Mapping[str, float] = WEIGHTS
) -> Callable[[int, int], Iterator[Document]]:
    """source(worker, workers) of documents of at most `longest` tokens. long: the share of those that are long.
    weights: of the tasks."""

    def source(worker: int, workers: int) -> Iterator[Document]:
        made = mixture(_tokenizer(), split, seed, longest, weights, worker=worker, workers=workers, long=long)
        for example, encoded in made:
            yield Document(encoded.tokens, encoded.learn, TASKS.index(example.task))

    return source


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)
