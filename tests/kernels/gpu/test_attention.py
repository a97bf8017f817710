"""Sparse attention against float64, and against itself: a query's bits are its own."""

import pytest
import torch

from support.kernels import same_bits
from weft.kernels.gpu import attention
from weft.kernels.gpu.attention import sparse_attention
from weft.kernels.gpu.base import GLUON
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.output import inverse_rope
from weft.kernels.layouts import RowLayout, kv_fp8, kv_fp8_v41
from weft.kernels.reference.attention import Example, example
from weft.kernels.reference.attention import sparse_attention as reference
from weft.kernels.reference.heads import angles
from weft.kernels.reference.rows import gather

SMALL = kv_fp8(16, 48, 16)
V4 = kv_fp8(64, 448, 64)
LAYOUTS = {
    "tiny": SMALL,
    "two groups": kv_fp8(8, 96, 32),
    "528 bytes": kv_fp8_v41(8, 64),
    "pages of one": kv_fp8(1, 48, 16),
    "V4": V4,
    "V4, pages of two": kv_fp8(2, 448, 64),
}
# Kernels, and the rows that their tests use where nothing depends on them.
ROWS = {"triton": SMALL, "triton_sm90": V4}


@pytest.fixture(params=ROWS, autouse=True)
def kernel(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs for each kernel that this machine can run, on rows that it takes."""
    name: str = request.param
    if name == "triton_sm90" and (device == "cpu" or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("Hopper's own instructions need a Hopper GPU")
    monkeypatch.setattr(attention, "choose", lambda *_: attention.Choice("sparse_attention", name, "under test"))
    return name


@pytest.fixture
def rows(kernel: str) -> RowLayout:
    return ROWS[kernel]


def run(e: Example, **kwargs) -> torch.Tensor:
    return sparse_attention(e.q, e.pool, e.index, e.lengths, e.sink, e.scale, **kwargs)


def check(e: Example, **kwargs) -> None:
    """float16 rounds q, the weights and the rows' bfloat16 channels to 2^-11 of themselves (codes are exact), and
    the output to its dtype. A rounded q or row moves a logit by at most 2 * 2^-11 * scale * sum |q| |k|, a weight
    by e^that and 2^-11; the weights sum to 1 at most, so the output moves by that share of the largest row, twice
    (numerator and denominator). Parts of a split list are float16 as well: once more 2^-11 of the largest row.
    Float32 sums of N terms add N * 2^-23 at most; rows and parts below 2^-14 round to 2^-25."""
    out, want = run(e, **kwargs).double(), reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    assert out.shape == want.shape and torch.isfinite(out).all()
    unit, columns = 2.0**-11, e.index.shape[1]
    for token in range(len(e.q)):
        rows = e.index[token, : int(e.lengths[token])]
        keys = gather(e.pool, rows[rows >= 0]).abs()
        if not len(keys):
            assert (out[token] == 0).all()
            continue
        shift = (e.q[token].double().abs() @ keys.T).max(1).values * e.scale * (2 * unit + columns * 2.0**-23)
        share = torch.expm1(shift) * 2 + 4 * unit + columns * 2.0**-23
        bound = share[:, None] * keys.max(0).values + want[token].abs() * torch.finfo(e.q.dtype).eps + 2.0**-24
        assert ((out[token] - want[token]).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 4, 17, 64, 96])
def test_equals_the_reference(layout: str, heads: int, device: str, kernel: str) -> None:
    if kernel == "triton_sm90" and not layout.startswith("V4"):
        pytest.skip("takes V4's rows only")
    check(example(3, 70, heads, LAYOUTS[layout], device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, device: str, rows: RowLayout) -> None:
    e = example(2, 33, 4, rows, device=device, dtype=dtype)
    check(e)
    assert run(e, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("split", [16, 64, 100])
@pytest.mark.parametrize("heads", [4, 64])
def test_splits(split: int, heads: int, device: str, rows: RowLayout) -> None:
    e = example(4, 130, heads, rows, device=device)
    e.lengths[:] = torch.tensor([130, 1, split, min(130, split + 1)])
    check(e, split=split)


def test_gaps_and_lengths(device: str, rows: RowLayout) -> None:
    """-1 anywhere, whole tiles of it, nothing at all, and columns beyond a length that must not be read."""
    e = example(6, 150, 8, rows, device=device)
    e.index[0, ::3] = -1
    e.index[1, :100] = -1
    e.index[2] = -1
    e.lengths[3] = 0
    e.lengths[4] = 67
    e.index[4, 67:] = 1 << 30  # reading it would fault, or fail the comparison
    check(e)


@pytest.mark.parametrize("heads", [4, 64])
def test_rows_that_are_not_listed_are_not_read(heads: int, device: str, rows: RowLayout) -> None:
    e = example(2, 40, heads, rows, device=device, pages=20)
    before = run(e)
    listed = torch.zeros(20 * rows.page, dtype=torch.bool, device=device)
    listed[e.index.long().flatten()] = True
    data = e.pool.bytes[:, : rows.scales_at].view(20, rows.page, rows.data_bytes)
    data[~listed.view(20, rows.page)] = 0x7F  # NaN in e4m3 and in bfloat16
    assert torch.equal(run(e), before)


@pytest.mark.parametrize("spread", [1e-5, 30.0, 2000.0])
def test_extreme_rows(spread: float, device: str, rows: RowLayout) -> None:
    """Scales at the format's floor, and logits that leave one row all the weight."""
    e = example(2, 40, 4, rows, device=device, spread=spread)
    out, want = run(e).double(), reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    if spread < 2000:
        check(e)
    assert torch.isfinite(out).all() and (out - want).abs().max() <= 0.05 * want.abs().max()


@pytest.mark.parametrize("bias", [float("-inf"), -1e30, 1e4])
def test_extreme_sinks(bias: float, device: str, rows: RowLayout) -> None:
    """Of lists in one part and in two, and of one without rows: then nothing at all may have weight."""
    e = example(3, 40, 4, rows, device=device)
    e.lengths[0] = 20
    e.index[2] = -1
    e.sink.fill_(bias)
    check(e)
    check(e, split=32)


def test_equal_rows_share_the_weight(device: str, rows: RowLayout) -> None:
    e = example(1, 64, 4, rows, device=device)
    e.index[:] = e.index[0, 0]
    e.sink.fill_(float("-inf"))
    out = run(e).double()
    want = gather(e.pool, e.index[0, :1])
    assert (out - want).abs().max() <= want.abs().max() * 2.0**-10


def test_nothing(device: str, rows: RowLayout) -> None:
    e = example(1, 16, 4, rows, device=device)
    none = Example(e.q[:0], e.pool, e.index[:0], e.lengths[:0], e.sink, e.scale)
    assert run(none).shape == (0, 4, rows.channels)
    assert (run(Example(e.q, e.pool, e.index[:, :0], e.lengths, e.sink, e.scale)) == 0).all()


@pytest.mark.parametrize("heads", [4, 64])
def test_a_query_has_the_same_bits_in_any_batch(heads: int, device: str, rows: RowLayout) -> None:
    """Alone, in another order, beside longer lists (which split), as decode and as prefill rows."""
    e = example(5, 300, heads, rows, device=device)
    e.lengths[:] = torch.tensor([300, 5, 129, 128, 0])
    together = run(e, split=64)
    for token in range(5):
        part = slice(token, token + 1)
        width = max(1, int(e.lengths[token]))  # a narrower list, so fewer splits in the call
        alone = Example(e.q[part], e.pool, e.index[part, :width], e.lengths[part], e.sink, e.scale)
        assert torch.equal(run(alone, split=64), together[part])
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    mixed = Example(e.q[order], e.pool, e.index[order], e.lengths[order], e.sink, e.scale)
    assert torch.equal(run(mixed, split=64), together[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "rope"), [(4, 16), (64, 2), (5, 0)])
def test_rotated_back_as_by_a_launch_of_its_own(
    heads: int, rope: int, dtype: torch.dtype, device: str, rows: RowLayout
) -> None:
    """Lists in one part, in several, without rows; and calls in which no list is split."""
    e = example(5, 300, heads, rows, device=device)
    e.lengths[:] = torch.tensor([300, 5, 129, 128, 0])
    turn = angles(torch.randint(0, 100_000, (5,), device=device), rope)
    for split in (64, 512):
        whole = inverse_rope(run(e, split=split, dtype=dtype), turn)
        assert same_bits(run(e, split=split, dtype=dtype, rotate_back=turn), whole)
    one = Example(e.q[1:2], e.pool, e.index[1:2, :5], e.lengths[1:2], e.sink, e.scale)
    assert same_bits(run(one, split=64, dtype=dtype, rotate_back=turn[1:2]), whole[1:2])
    named = run(one, dtype=dtype, implementation="reference")
    turned = run(one, dtype=dtype, rotate_back=turn[1:2], implementation="reference")
    assert same_bits(turned, inverse_rope(named, turn[1:2], implementation="reference"))


def test_v4_flash(device: str) -> None:
    """64 heads, 128 window rows and 512 entries of 584 bytes; moves at most 1.3 times the least bytes."""
    e = example(1, 640, device=device, pages=12)
    check(e)
    if device == "cpu":
        with traffic() as moved:
            run(e, dtype=torch.bfloat16, rotate_back=angles(e.lengths, 64))
        assert moved.total <= 1.3 * attention.least_bytes(1, 640, 64, e.pool, rope=64)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_many_queries(heads: int, device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More items than multiprocessors, so that a block takes several, of one list or more; one slab or ten."""
    if kernel == "triton":
        pytest.skip("of the Hopper kernel, which divides its work so")
    e = example(150, 640, heads, V4, device=device, pages=100)
    e.lengths[:4] = torch.tensor([0, 1, 128, 500])
    e.index[7, 200:400] = -1
    together = run(e)
    with monkeypatch.context() as patch:
        patch.setattr("weft.kernels.triton.attention_sm90.PART_BYTES", 1)
        assert torch.equal(run(e), together)
    few = Example(e.q[:9], e.pool, e.index[:9], e.lengths[:9], e.sink, e.scale)
    check(few)
    assert torch.equal(run(few), together[:9])
    for token in (0, 3, 7, 149):
        one = slice(token, token + 1)
        alone = Example(e.q[one], e.pool, e.index[one], e.lengths[one], e.sink, e.scale)
        assert torch.equal(run(alone), together[one])


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    everything = frozenset({"triton", GLUON})
    for arch, libraries, layout, chosen in (
        ("cpu", everything, V4, "reference"),
        ("sm80", everything, V4, "reference"),
        ("sm89", everything, V4, "triton"),
        ("sm90", everything, V4, "triton_sm90"),
        ("sm90", everything, kv_fp8_v41(64), "triton"),
        ("sm90", frozenset(), V4, "reference"),
        ("sm100", everything, V4, "triton_sm100"),
        ("sm100", frozenset({"triton"}), V4, "triton"),
        ("sm100", everything, SMALL, "triton"),
    ):
        assert attention.choose(arch, libraries, layout).implementation == chosen
    assert RowLayout(64, 448, 64, 64, align=8, pad=0).row_bytes == 584
