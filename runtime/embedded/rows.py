"""Documents packed into rows for training, made by worker processes beside the training itself."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.runtime.config import C4, C128

PAD = 2
_OPEN = 8  # rows that wait for a document that fits
_LITTLE = 32  # tokens of room not worth waiting with


class Document(NamedTuple):
    """learn: what the model is to say itself. task: its number."""

    tokens: list[int]
    learn: list[bool]
    task: int


class Rows(NamedTuple):
    """All [B, T]. positions: in the own document, which starts at a multiple of 128, or of 4 if it is shorter than
    that and so has no c128a entry. weight: of a learnt token, falling with the root of how many its turn has, or
    the one token of a letter would count for nothing beside a tool call. document: counts from 1 in its row; 0 is
    filling. task: -1 is filling."""

    ids: Tensor
    positions: Tensor
    learn: Tensor
    weight: Tensor
    document: Tensor
    task: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(part.to(device, non_blocking=True) for part in self))


class _Row:
    def __init__(self, length: int) -> None:
        self.length = length
        self.parts = np.zeros((5, length), np.int32)
        self.parts[0], self.parts[4] = PAD, -1
        self.used = self.documents = 0

    def start(self, size: int) -> int:
        """Where a document of this size would begin."""
        step = C128 if size >= C128 else C4
        return -(-self.used // step) * step

    def fits(self, size: int) -> bool:
        return self.start(size) + size <= self.length

    def add(self, document: Document) -> None:
        size = len(document.tokens)
        start = self.start(size)
        self.documents += 1
        own = self.parts[:, start : start + size]
        own[0], own[2], own[3], own[4] = document.tokens, _runs(document.learn), self.documents, document.task
        self.used = start + size
        self.parts[1, start : self.used] = np.arange(size)
        self.parts[1, self.used :] = np.arange(self.length - self.used)  # filling sees itself only


def _runs(learn: list[bool]) -> NDArray[np.int32]:
    """For each learnt token the length of its run, 0 for the others."""
    flags = np.asarray(learn)
    ends = np.flatnonzero(np.diff(flags, append=not flags[-1]))
    lengths = np.diff(ends, prepend=-1)
    runs: NDArray[np.int32] = (flags * np.repeat(lengths, lengths)).astype(np.int32)
    return runs


def pack(documents: Iterable[Document], length: int) -> Iterator[NDArray[np.int32]]:
    """Rows [5, length] in the order in which they fill up; the parts are those of `Rows`.

    A document goes where it leaves the smallest gap; none may be longer than a row.
    """
    waiting: list[_Row] = []
    for document in documents:
        size = len(document.tokens)
        assert size <= length, f"a document of {size} tokens in rows of {length}"
        fitting = [row for row in waiting if row.fits(size)]
        row = min(fitting, key=lambda r: (r.start(size) - r.used, -r.used), default=None)
        if row is None:
            row = _Row(length)
            waiting.append(row)
        row.add(document)
        full = max(waiting, key=lambda r: r.used)
        if length - full.used < _LITTLE or len(waiting) > _OPEN:
            waiting.remove(full)
            yield full.parts
    for row in waiting:
        yield row.parts


def as_rows(packed: list[NDArray[np.int32]]) -> Rows:
    ids, positions, learn, document, task = torch.from_numpy(np.stack(packed, 1)).long()
    return Rows(ids, positions, learn > 0, (learn > 0) * learn.clamp_min(1) ** -0.5, document, task)


class Feed:
    """Batches of rows for ever, in an order that depends on the arguments alone.

    source(worker, workers) gives a worker's documents; worker w makes batches w, w + workers, and so on.
    """

    def __init__(
        self,
        source: Callable[[int, int], Iterator[Document]],
        *,
        rows: int,
        length: int,
        workers: int,
        ahead: int = 4,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._queues = [context.Queue(ahead) for _ in range(workers)]
        self._processes = [
            context.Process(target=_work, args=(source, worker, workers, rows, length, queue), daemon=True)
            for worker, queue in enumerate(self._queues)
        ]
        for process in self._processes:
            process.start()

    def __iter__(self) -> Iterator[Rows]:
        for queue in itertools.cycle(self._queues):
            yield as_rows(queue.get())

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _work(
    source: Callable[[int, int], Iterator[Document]],
    worker: int,
    workers: int,
    rows: int,
    length: int,
    queue: multiprocessing.Queue[list[NDArray[np.int32]]],
) -> None:
    packed = pack(source(worker, workers), length)
    while batch := list(itertools.islice(packed, rows)):
        queue.put(batch)
