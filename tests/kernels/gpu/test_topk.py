"""Top-k against a stable sort: exact, whatever the width, ties and -inf included, and its bytes."""

import pytest
import torch

from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.topk import choose, least_bytes, top_k_rows
from weft.kernels.reference.topk import example
from weft.kernels.triton.topk import SLAB, config


def run(data, name=None, **changed):
    """The columns written, those beside them being untouched."""
    fields = ("logits", "visible", "k", "tables", "sequence", "page", "base")
    arguments = {field: changed.get(field, getattr(data, field)) for field in fields}
    rows = arguments["logits"].shape[0]
    column, k = data.column, arguments["k"]
    out = torch.full((rows, column + k + 3), 77, dtype=torch.int32, device=data.out.device)
    top_k_rows(*arguments.values(), out, column, implementation=name)
    assert (out[:, :column] == 77).all() and (out[:, column + k :] == 77).all()
    return out[:, column : column + k]


def check(data, **changed):
    got = run(data, "triton", **changed)
    assert torch.equal(got, run(data, "reference", **changed))
    return got


@pytest.mark.parametrize("k", [1, 8, 64, 100, 512])
@pytest.mark.parametrize("width", [1, 7, 63, 257, 1024, 2050])
def test_random_rows(k, width, device):
    data = example(3, width, k=k, device=device)
    check(data)
    check(data, logits=data.logits - 4.0)


@pytest.mark.parametrize("k", [8, 512])
def test_every_count_of_visible_entries(k, device):
    """None, fewer than k, k, one more, all but one, all."""
    counts = [0, 1, k - 1, k, k + 1, 2 * k + 3, 1199, 1200]
    data = example(len(counts), 1200, k=k, device=device)
    got = check(data, visible=torch.tensor(counts, dtype=torch.int32, device=device))
    assert [(row >= 0).sum() for row in got] == [min(count, k) for count in counts]


def test_what_is_not_visible_is_not_used(device):
    """NaN behind the visible columns, and everywhere where all entries are taken; page numbers out of reach."""
    data = example(4, 900, k=64, device=device)
    visible = torch.tensor([900, 301, 64, 10], dtype=torch.int32, device=device)
    clean = check(data, visible=visible)
    logits = data.logits.clone()
    tables = torch.full((4, 100), 1 << 29, dtype=torch.int32, device=device)
    for row, count in enumerate(visible.tolist()):
        logits[row, count if count > 64 else 0 :] = float("nan")
        used = -(-count // data.page)
        tables[row, :used] = data.tables[row, :used]
    assert torch.equal(run(data, "triton", logits=logits, tables=tables, visible=visible), clean)


@pytest.mark.parametrize("width", [300, 2048])
@pytest.mark.parametrize("values", [1, 2, 5, 40])
def test_ties_go_to_the_lower_entry(values, width, device):
    data = example(4, width, k=64, device=device)
    levels = torch.randint(-values, values, data.logits.shape, device=device) / 3.0
    check(data, logits=levels)
    got = check(data, logits=torch.zeros_like(levels), tables=data.tables[:1].repeat(4, 1))
    assert torch.equal(got[:, :64], got[:1, :64].expand(4, 64))


def test_extremes(device):
    """Infinities, the largest and the least numbers, both zeros, which are equal, and neighbours of one bit."""
    special = [float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0, 1.0 + 2.0**-23, -1.0]
    pattern = torch.tensor(special, device=device)
    data = example(3, 700, k=100, device=device)
    choice = torch.randint(0, len(special), data.logits.shape, device=device)
    check(data, logits=pattern[choice])
    zeros = torch.where(torch.rand(data.logits.shape, device=device) < 0.5, 0.0, -0.0)
    check(data, logits=zeros)
    check(data, logits=torch.full_like(data.logits, float("-inf")))
    check(data, k=1, logits=pattern[choice])


def test_pages_base_and_a_shared_table(device):
    data = example(6, 500, k=64, page=2, device=device)
    check(data, base=123456)
    check(data, page=100, tables=data.tables[:, :5].contiguous())
    check(data, sequence=torch.tensor([2, 2, 0, 5, 2, 0], dtype=torch.int32, device=device))


def test_rows_do_not_depend_on_the_batch_or_the_width(device):
    """A row alone, permuted, and in tensors so wide that they go through slabs."""
    data = example(5, 1500, k=64, device=device)
    data.visible.copy_(torch.tensor([1500, 64, 900, 65, 1499]))
    whole = check(data)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    part = {name: getattr(data, name)[order] for name in ("logits", "visible", "sequence")}
    assert torch.equal(run(data, "triton", **part), whole[order])
    for row in range(5):
        part = {name: getattr(data, name)[row : row + 1] for name in ("logits", "visible", "sequence")}
        assert torch.equal(run(data, "triton", **part), whole[row : row + 1])
    wide = torch.full((5, SLAB + 4), float("nan"), device=device)
    wide[:, :1500] = data.logits
    assert torch.equal(run(data, "triton", logits=wide), whole)


@pytest.mark.parametrize("k", [64, 512, 1024])
def test_rows_of_several_slabs(k, device):
    """The best in one slab, spread, equal across slabs, and slabs with fewer than k entries."""
    width = 2 * SLAB + 40
    data = example(1, width, k=k, device=device)
    check(data)
    check(data, logits=data.logits.sort().values)
    check(data, logits=data.logits.sort(descending=True).values)
    check(data, logits=torch.randint(0, 3, data.logits.shape, device=device).float())
    counts = [width, SLAB, SLAB + 1, 2 * SLAB + 5, k, 0]
    many = {
        "logits": data.logits.repeat(6, 1),
        "visible": torch.tensor(counts, dtype=torch.int32, device=device),
        "sequence": torch.zeros(6, dtype=torch.int32, device=device),
    }
    check(data, **many)


@pytest.mark.slow
@pytest.mark.parametrize("k", [512, 1024])
def test_a_million_tokens(k, device):
    """262,144 entries."""
    data = example(1, 1 << 18, k=k, device=device)
    check(data)
    check(data, logits=(data.logits * 50).round())


def test_a_strided_row(device):
    data = example(3, 400, k=64, device=device)
    wide = torch.full((3, 1001), float("nan"), device=device)
    wide[:, :400] = data.logits
    assert torch.equal(run(data, "triton", logits=wide[:, :400]), run(data, "reference"))


def test_nothing_to_do(device):
    data = example(2, 100, k=8, device=device)
    none = slice(0, 0)
    part = {name: getattr(data, name)[none] for name in ("logits", "visible", "sequence")}
    assert run(data, "triton", **part).shape == (0, 8)
    assert run(data, "triton", k=0).shape == (2, 0)
    empty = torch.zeros(2, 0, device=device)
    assert (run(data, "triton", logits=empty, visible=torch.zeros_like(data.visible)) == -1).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted by the interpreter")
@pytest.mark.parametrize(("width", "k"), [(2048, 512), (SLAB, 512), (4 * SLAB, 512), (2 * SLAB, 1024)])
def test_bytes(width, k):
    """A row is read once; slabs add an entry written, and read with its score, per candidate: 3k / SLAB."""
    data = example(2, width, k=k)
    with traffic() as moved:
        run(data, "triton")
    assert moved.total <= 1.3 * least_bytes(2, 2 * width, k)


def test_how_rows_are_cut():
    assert config(100, 8) == (1, 256, 0)
    assert config(SLAB, 512) == (1, SLAB, 0)
    assert config(1 << 18, 1024) == (16, SLAB, 16384)
    assert choose(2048, 512, "sm90", frozenset({"triton"})).implementation == "triton"
    assert choose(2048, 512, "cpu", frozenset()).implementation == "reference"
