"""The entries chosen for each query, and their independence of how queries are grouped."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from support.kernels import arrays, on_tensors, threads
from weft.kernels import indexer
from weft.kernels.indexer import COLUMNS, QueryBlocks, block_rows
from weft.kernels.kv_rows import DenseRows

select_entries = on_tensors(indexer.select_entries)
UNTOUCHED = -7  # what `out` holds where nothing was written


@dataclass
class Batch:
    """`sequence` and `visible` of each query, sequences side by side in a pool with scattered rows."""

    q: Tensor
    weights: Tensor
    pool: Tensor
    tables: Tensor
    sequence: list[int]
    visible: list[int]
    k: int

    @property
    def least(self) -> int:
        return block_rows(self.q.shape[1])

    def select(
        self, groups: list[QueryBlocks], pool: Tensor | None = None, tables: Tensor | None = None
    ) -> Tensor:
        out = torch.full((len(self.sequence), self.k), UNTOUCHED)
        rows = DenseRows(self.pool if pool is None else pool)
        tables = self.tables if tables is None else tables
        for blocks in groups:
            select_entries(self.q, self.weights, rows, tables, blocks, self.k, out)
        return out

    def blocks(self, parts: list[list[int]], size: int) -> QueryBlocks:
        """One block per part: queries of one sequence, the last one repeated up to `size`."""
        rows = torch.tensor([part + part[-1:] * (size - len(part)) for part in parts])
        keep = torch.arange(size) < torch.tensor([[len(part)] for part in parts])
        owner = torch.tensor([self.sequence[part[0]] for part in parts])
        return QueryBlocks(*arrays((rows, keep, owner, torch.tensor(self.visible)[rows])))

    def of_size(self, size: int) -> list[QueryBlocks]:
        """All queries in one group, `size` at a time."""
        return [self.blocks(self.parts(size), size)]

    def parts(self, size: int) -> list[list[int]]:
        parts = []
        for sequence in sorted(set(self.sequence)):
            mine = [i for i, owner in enumerate(self.sequence) if owner == sequence]
            parts += [mine[i : i + size] for i in range(0, len(mine), size)]
        return parts


def draw(heads: int, dim: int, visible: list[list[int]], k: int, *, whole_numbers: bool = False) -> Batch:
    """`visible`: for each sequence, how many entries its queries see."""

    def values(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape).float() if whole_numbers else torch.randn(shape)

    entries = [max(counts) for counts in visible]
    width = max(COLUMNS, -(-max(entries) // COLUMNS) * COLUMNS)
    place = torch.randperm(sum(entries)) + 1
    tables = torch.zeros(len(visible), width, dtype=torch.int64)
    start = 0
    for sequence, count in enumerate(entries):
        tables[sequence, :count] = place[start : start + count]
        start += count
    pool = values(start + 1, dim)
    pool[0] = 0
    queries = sum(map(len, visible))
    owner = [sequence for sequence, counts in enumerate(visible) for _ in counts]
    seen = [count for counts in visible for count in counts]
    return Batch(values(queries, heads, dim), values(queries, heads), pool, tables, owner, seen, k)


def expected(batch: Batch, query: int) -> list[int]:
    """Scores in float64; whole numbers are exact there and in float32, so ties are ties in both."""
    table = batch.tables[batch.sequence[query]]
    keys = batch.pool[table[: batch.visible[query]]].double()
    scores = (batch.q[query].double() @ keys.T).clamp(min=0).mul(batch.weights[query].double()[:, None]).sum(0)
    order = sorted((-score, entry) for entry, score in enumerate(scores.tolist()))
    best = sorted(entry for _, entry in order[: batch.k])
    return best + [-1] * (batch.k - len(best))


SEEN = [[400] * 5, [0, 1, 2, 7, 8, 9], [127, 128, 129], [3], [0], list(range(100, 137))]


@pytest.mark.parametrize(("heads", "dim", "k"), [(16, 32, 8), (3, 4, 1), (1, 1, 5), (5, 33, 200), (64, 128, 512)])
def test_best_entries_of_whole_numbers(heads: int, dim: int, k: int) -> None:
    """Many ties, all of them exact: the lower entry wins."""
    batch = draw(heads, dim, SEEN, k, whole_numbers=True)
    want = [expected(batch, query) for query in range(len(batch.sequence))]
    for size in (batch.least, 2 * batch.least, 16 * batch.least):
        assert batch.select(batch.of_size(size)).tolist() == want


def test_best_entries_of_random_numbers() -> None:
    batch = draw(16, 32, SEEN, 8)
    got = batch.select(batch.of_size(batch.least))
    assert got.tolist() == [expected(batch, query) for query in range(len(batch.sequence))]


def test_queries_that_see_nothing() -> None:
    """A group of its own, as the first tokens of a prompt make beside a long decode."""
    batch = draw(16, 32, [[0, 0, 0], [0]], 4)
    assert batch.select(batch.of_size(2)).tolist() == [[-1] * 4] * 4


def test_only_kept_rows_are_written() -> None:
    batch = draw(16, 32, [[50, 60, 70], [20]], 4)
    out = batch.select([batch.blocks([[0, 2]], 4)])
    assert out[1].tolist() == out[3].tolist() == [UNTOUCHED] * 4
    assert out[0].tolist() == expected(batch, 0)
    assert out[2].tolist() == expected(batch, 2)


def test_no_blocks() -> None:
    batch = draw(16, 32, [[50]], 4)
    empty = torch.empty(0, 4, dtype=torch.int64)
    blocks = QueryBlocks(*arrays((empty, empty.bool(), torch.empty(0, dtype=torch.int64), empty)))
    assert batch.select([blocks]).tolist() == [[UNTOUCHED] * 4]


PRESETS = [(16, 32, 8), (64, 128, 64)]


@pytest.mark.parametrize(("heads", "dim", "k"), [*PRESETS, (4, 32, 8), (3, 64, 8)])
def test_grouping_does_not_matter(heads: int, dim: int, k: int) -> None:
    """The same queries by sequence, one by one, shuffled over groups, and padded to other sizes."""
    batch = draw(heads, dim, SEEN, k)
    want = batch.select(batch.of_size(batch.least))
    assert int(want.min()) > UNTOUCHED
    for size in (2 * batch.least, 3 * batch.least, 16 * batch.least):
        assert torch.equal(batch.select(batch.of_size(size)), want), size
    one_each = [batch.blocks([[query]], batch.least) for query in range(len(batch.sequence))]
    assert torch.equal(batch.select(one_each), want)
    for size in (batch.least, 4 * batch.least):
        parts = batch.parts(size)
        random.shuffle(parts)
        cut = len(parts) // 3
        groups = [batch.blocks(parts[:cut], size), batch.blocks(parts[cut:], size + batch.least)]
        assert torch.equal(batch.select(groups), want), size


@pytest.mark.parametrize(("heads", "dim", "k"), PRESETS)
def test_blocking_does_not_matter(heads: int, dim: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw(heads, dim, SEEN, k)
    groups = batch.of_size(batch.least)
    want = batch.select(groups)
    per_block = batch.least * 4 * COLUMNS * (heads + 6)
    for blocks in (0, 1, 2, 3, 7):
        monkeypatch.setattr(indexer, "_BLOCK_ELEMENTS", blocks * per_block)
        assert torch.equal(batch.select(groups), want), blocks


@pytest.mark.parametrize(("heads", "dim", "k"), PRESETS)
def test_entries_of_others_do_not_matter(heads: int, dim: int, k: int) -> None:
    """Wider tables, other pool rows, later entries of the same sequence that are not visible yet."""
    batch = draw(heads, dim, SEEN, k)
    groups = batch.of_size(2 * batch.least)
    want = batch.select(groups)
    wide = torch.cat((batch.tables, torch.zeros(len(SEEN), 2 * COLUMNS, dtype=torch.int64)), 1)
    assert torch.equal(batch.select(groups, tables=wide), want)
    rows = batch.pool.shape[0]
    place = torch.randperm(3 * rows)[:rows] + 1
    place[0] = 0
    other = torch.randn(3 * rows + 1, dim)
    other[place] = batch.pool
    assert torch.equal(batch.select(groups, other, place[batch.tables]), want)
    later = batch.tables.clone()
    later[later == 0] = 1
    assert torch.equal(batch.select(groups, tables=later), want)


def test_a_query_alone_in_the_batch() -> None:
    """Rows of q and weights are taken by number: one query's own batch gives its own entries."""
    batch = draw(16, 32, SEEN, 8)
    want = batch.select(batch.of_size(batch.least))
    for query in range(0, len(batch.sequence), 5):
        alone = Batch(
            batch.q[query : query + 1].clone(),
            batch.weights[query : query + 1].clone(),
            batch.pool,
            batch.tables[batch.sequence[query] :][:1],
            [0],
            [batch.visible[query]],
            batch.k,
        )
        assert torch.equal(alone.select(alone.of_size(alone.least))[0], want[query])


def test_stored_bfloat16_keys_are_widened() -> None:
    batch = draw(16, 32, SEEN, 8)
    groups = batch.of_size(batch.least)
    narrow = batch.pool.bfloat16()
    assert torch.equal(batch.select(groups, narrow), batch.select(groups, narrow.float()))


def test_two_threads() -> None:
    batch = draw(16, 32, SEEN, 8)
    with threads(2):
        want = batch.select(batch.of_size(batch.least))
        assert torch.equal(batch.select(batch.of_size(16)), want)
        one_each = [batch.blocks([[query]], batch.least) for query in range(len(batch.sequence))]
        assert torch.equal(batch.select(one_each), want)
