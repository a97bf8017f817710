"""The indexer's scores and gathered keys against float64, their bits across batches, and their bytes."""

import pytest
import torch
import triton

from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.indexer import (
    GatheredKeys,
    IndexQuery,
    choose,
    gather_keys,
    index_logits,
    index_logits_ragged,
    index_query,
    least_bytes,
)
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.layouts import keys_fp4, keys_fp8
from weft.kernels.reference.indexer import (
    example,
    key_values,
    query_values,
    read_keys,
    store_keys,
)

FORMATS = {"e4m3": keys_fp8, "e2m1": keys_fp4}
NAMES = list(FORMATS)
INTERPRETED = not torch.cuda.is_available()
# The interpreter has tl.dot_scaled from Triton 3.9 on; a GPU needs the instruction.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
BLACKWELL = _VERSION >= (3, 9) if INTERPRETED else torch.cuda.get_device_capability()[0] == 10
RUNS = [("e4m3", "triton"), ("e2m1", "triton"), *([("e2m1", "triton_sm100")] if BLACKWELL else [])]


def make(kind, *, tokens=None, seed=0, device="cpu", sequences=3, entries=150, page=64, **sizes):
    """An example of a format with its query."""
    dim = sizes.get("dim", 128)
    data = example(sequences, entries, layout=FORMATS[kind](page, dim), seed=seed, device=device, **sizes)
    query = index_query(data.q, data.weights, data.cos_sin, codes=kind, hadamard=True, implementation="reference")
    return data, query


def take(query, rows):
    scales = None if query.scales is None else query.scales[rows].contiguous()
    return IndexQuery(query.codes[rows].contiguous(), scales, query.weights[rows].contiguous())


def score(name, data, query, **changed):
    arguments = {"tables": data.tables, "sequence": data.sequence, "visible": data.visible, **changed}
    width = arguments.pop("width", data.width)
    return index_logits(query, arguments.pop("keys", data.keys), width=width, **arguments, implementation=name)


def bound(query, keys):
    """Of the error of one row's scores [C]: query of one token, keys [C, dI] float64.

    Products of two codes have at most 8 significant bits, so they are exact, and what is left is the rounding of
    sums: dI products, the heads, and the multiplications by weight and scale, each 2^-24 of what is summed. Hopper
    adds fp8 products, 32 at a time, 13 bits behind the point of the largest: dI * 2^-13 of the largest product.
    """
    q = query_values(query)[0].abs()
    weights = query.weights[0].double().abs()
    summed = (weights[:, None] * (q @ keys.abs().T)).sum(0)
    error = (keys.shape[1] + q.shape[0] + 4) * 2.0**-24 * summed
    if not INTERPRETED and query.scales is None:
        largest = (q[:, None] * keys.abs()).amax(2)
        error = error + (keys.shape[1] + 4) * 2.0**-13 * (weights[:, None] * largest).sum(0)
    return error


def check_scores(got, data, query):
    for token, count in enumerate(data.visible.tolist()[: len(got)]):
        table = data.tables[int(data.sequence[token])].long()
        entry = torch.arange(count, device=got.device)
        page = data.keys.layout.page
        keys = key_values(read_keys(data.keys, table[entry // page] * page + entry % page))
        one = take(query, slice(token, token + 1))
        products = (query_values(one)[0] @ keys.T).clamp_min(0.0)
        want = (one.weights[0].double()[:, None] * products).sum(0)
        assert ((got[token, :count].double() - want).abs() <= bound(one, keys)).all()
        assert (got[token, count:] == float("-inf")).all()


# -- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), RUNS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 2, "entries": 300},
        {"rows": 9, "sequences": 2, "entries": 130},
        {"heads": 16, "dim": 32, "rope": 16, "page": 16, "entries": 70, "rows": 20},
        {"heads": 5, "dim": 64, "rope": 16, "page": 2, "entries": 33},
        {"sequences": 1, "entries": 1},
    ],
)
def test_scores_against_float64(kind, name, sizes, device):
    if name == "triton_sm100" and sizes.get("dim", 128) < 64:
        pytest.skip("a tile of fp4 has 64 channels at least")
    data, query = make(kind, device=device, **sizes)
    check_scores(score(name, data, query), data, query)


@pytest.mark.parametrize(("kind", "name"), RUNS)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 128, 129, 256, 257, 320])
def test_ends_of_pages_and_tiles(kind, name, count, device):
    data, query = make(kind, sequences=1, entries=320, rows=2, heads=4, device=device)
    data.visible.fill_(count)
    got = score(name, data, query)
    check_scores(got, data, query)
    narrow = score(name, data, query, width=count)
    assert torch.equal(narrow, got[:, :count])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_nothing_else_is_read(kind, name, device):
    """What no token sees: NaN in the pool, page numbers far outside it."""
    data, query = make(kind, sequences=2, entries=200, rows=3, heads=8, device=device)
    clean = score(name, data, query)
    layout = data.keys.layout
    seen = torch.zeros(data.keys.bytes.shape[0] * layout.page, dtype=torch.bool, device=device)
    for table, count in zip(data.tables.long(), data.visible.view(2, -1).amax(1).tolist(), strict=True):
        entry = torch.arange(count, device=device)
        seen[table[entry // layout.page] * layout.page + entry % layout.page] = True
    data.keys.bytes[:, : layout.scales_at].unflatten(1, (layout.page, -1))[~seen.view(-1, layout.page)] = 0x7F
    scales = data.keys.bytes[:, layout.scales_at :].unflatten(1, (layout.page, -1))
    scales[~seen.view(-1, layout.page)] = 0xFF
    tables = torch.cat((data.tables, torch.full_like(data.tables, 1 << 29)), 1)
    assert torch.equal(score(name, data, query, tables=tables), clean)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_rows_do_not_depend_on_the_batch(kind, name, device):
    """Alone, permuted (neighbours of other sequences), one token each, eight of a sequence at once, and wider."""
    data, query = make(kind, sequences=3, entries=200, rows=9, heads=16, device=device)
    whole = score(name, data, query)
    order = torch.randperm(27, device=device)
    mixed = score(
        name, data, take(query, order), sequence=data.sequence[order], visible=data.visible[order], width=384
    )
    assert torch.equal(mixed[:, : data.width], whole[order])
    for token in (0, 13, 26):
        one = slice(token, token + 1)
        alone = score(
            name, data, take(query, one), sequence=data.sequence[one], visible=data.visible[one], width=201
        )
        assert torch.equal(alone, whole[one, :201])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_gathered_keys_give_the_same_bits(kind, name, device):
    data, query = make(kind, sequences=3, entries=150, rows=9, heads=16, device=device)
    counts = torch.tensor([150, 0, 70], dtype=torch.int32, device=device)
    starts = torch.tensor([70, 7, 0], dtype=torch.int32, device=device)
    visible = torch.minimum(data.visible, counts[data.sequence.long()])
    gathered = gather_keys(data.keys, data.tables, counts, starts, 221, implementation="triton")
    first = starts[data.sequence.long()]
    got = index_logits_ragged(
        query, gathered.codes, gathered.scales, first, visible, data.width, implementation=name
    )
    assert torch.equal(got, score(name, data, query, visible=visible))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("page", "dim"), [(64, 128), (16, 32), (2, 64)])
def test_gathered_keys_are_the_keys(kind, page, dim, device):
    data, _ = make(kind, sequences=3, entries=70, page=page, dim=dim, rope=16, heads=2, device=device)
    counts = torch.tensor([70, 0, 33], dtype=torch.int32, device=device)
    starts = torch.tensor([40, 40, 5], dtype=torch.int32, device=device)
    poisoned = torch.full_like(data.tables, 1 << 29)
    for number, count in enumerate(counts.tolist()):
        used = -(-count // page)
        poisoned[number, :used] = data.tables[number, :used]
    got, want = (
        gather_keys(data.keys, poisoned, counts, starts, 110, implementation=name)
        for name in ("triton", "reference")
    )
    for rows in (slice(5, 38), slice(40, 110)):
        assert torch.equal(got.codes[rows].view(torch.uint8), want.codes[rows].view(torch.uint8))
        assert torch.equal(got.scales[rows], want.scales[rows])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_extreme_and_equal_keys(kind, name, device):
    """The largest codes in every channel, opposite signs, zeros, and copies of a key, whose scores are equal."""
    layout = FORMATS[kind](64, 128)
    values = torch.full((64, 128), 448.0, device=device)
    values[1] *= -1
    values[2] = 0
    values[3] = torch.randn(128, device=device)
    values[40:] = values[3]
    keys = Pages.empty(2, layout, device)
    store_keys(values, layout, keys.bytes, torch.arange(64, 128, device=device))
    data, query = make(kind, sequences=1, entries=64, heads=64, device=device)
    query.codes.view(torch.uint8)[0, :32] = 0x7E if kind == "e4m3" else 0x77
    got = score(name, data, query, keys=keys, tables=torch.ones(1, 1, dtype=torch.int32, device=device))
    assert got.isfinite().all() and got[0, 2] == 0
    assert (got[0, 40:] == got[0, 3]).all()


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_no_tokens_and_no_columns(kind, name, device):
    data, query = make(kind, sequences=1, entries=64, heads=4, device=device)
    none = slice(0, 0)
    assert score(
        name, data, take(query, none), sequence=data.sequence[none], visible=data.visible[none]
    ).shape == (0, 64)
    data.visible.zero_()
    assert score(name, data, query, width=0).shape == (1, 0)
    gathered = gather_keys(data.keys, data.tables, data.visible, data.visible, 0)
    assert isinstance(gathered, GatheredKeys) and gathered.codes.shape[0] == 0


# -- at V4-Flash's width ------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted by the interpreter")
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_bytes_of_scores_at_decode(kind, name):
    """A chunk of keys, 256 at least, reads its query once."""
    data, query = make(kind, sequences=2, entries=2048)
    with traffic() as moved:
        got = score(name, data, query)
    assert moved.total <= 1.3 * least_bytes(query, data.keys.layout, 2 * 2048, data.width)
    check_scores(got, data, query)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted by the interpreter")
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_bytes_of_scores_at_prefill(kind, name):
    """A product of matrices reads both sides more than once, here from L2: keys once for 8 queries, queries once
    for 256 keys. Without those, the bound is the usual one."""
    data, query = make(kind, sequences=1, entries=512, rows=24)
    with traffic() as moved:
        score(name, data, query)
    again = query.nbytes + 2 * 512 * data.keys.layout.row_bytes
    assert moved.total <= again + 1.3 * least_bytes(query, data.keys.layout, 512, data.width)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted by the interpreter")
@pytest.mark.parametrize("kind", NAMES)
def test_bytes_of_gathered_keys(kind):
    data, _ = make(kind, sequences=2, entries=512)
    counts = torch.full((2,), 512, dtype=torch.int32)
    with traffic() as moved:
        gather_keys(data.keys, data.tables, counts, torch.tensor([0, 512], dtype=torch.int32), 1024)
    assert moved.total <= 1.3 * 2 * 1024 * data.keys.layout.row_bytes


def test_choices():
    triton = frozenset({"triton"})
    assert choose("e2m1", 128, "sm100", triton).implementation == "triton_sm100"
    assert choose("e2m1", 128, "sm90", triton).implementation == "triton"
    assert choose("e4m3", 128, "sm100", triton).implementation == "triton"
    assert choose("e4m3", 128, "cpu", triton).implementation == "reference"
    assert "Triton is not installed" in str(choose("e4m3", 128, "sm90", frozenset()))
