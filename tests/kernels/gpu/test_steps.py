"""Lists, plans and rotations of a step, against the reference and against what they are meant to say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support.kernels import same_bits
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.steps import (
    EntrySpans,
    StepIndex,
    StepSizes,
    StepSpans,
    embed_streams,
    least_bytes,
    step_index,
    store_rows,
)

WINDOW, TOP_K, PAGE, BASE = 12, 10, 4, 4000
FREQUENCIES = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)


def given(
    lengths: list[tuple[int, int]],
    device: str,
    *,
    pad: int = 0,
    pages: int = 1,
    tokens: int = 0,
    chain: int = 0,
    window: int = WINDOW,
) -> tuple[StepSpans, StepSizes]:
    """A step over sequences of (tokens before, tokens now). pad: sequences and entries more than there are; pages:
    of padding. Page p of sequence s has number 1000 s + p + 1, so that rows tell where they are from."""
    start = torch.tensor([before for before, _ in lengths] + [0] * pad)
    count = torch.tensor([now for _, now in lengths] + [0] * pad)
    total, longest = int(count.sum()), int((start + count).max())
    tokens = max(tokens, total)
    offset = count.cumsum(0) - count
    first = (start - window + 1).clamp_min(0) // PAGE

    def table(rows: int) -> torch.Tensor:
        return torch.arange(len(start))[:, None] * 1000 + torch.arange(-(-rows // PAGE) + pages) + 1

    def entries(ratio: int) -> EntrySpans:
        done = start.clamp_min(chain) // ratio
        many = ((start + count) // ratio - done).clamp_min(0)
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), many.cumsum(0)))
        return EntrySpans(*(x.int().to(device) for x in (done, ends, table(longest // ratio))))

    span = ((start + count - 1).clamp_min(0) // PAGE - first).max()
    own = table(int(span + 1) * PAGE) + 10 * first[:, None]
    c4, c128 = entries(4), entries(128)
    numbers = (x.int().to(device) for x in (start, count, offset, first, own))
    columns = longest // 128 + pad
    many = [int(kind.entries[-1]) + pad for kind in (c4, c128)]
    sizes = StepSizes(tokens, window, TOP_K, columns, *many, PAGE, BASE, BASE // 2)
    return StepSpans(*numbers, c4, c128), sizes


def run(spans: StepSpans, sizes: StepSizes, implementation: str | None = None) -> StepIndex:
    frequencies = FREQUENCIES.to(spans.start.device)
    return step_index(spans, sizes, frequencies, frequencies / 7, implementation=implementation)


def parts(out: object) -> dict[str, torch.Tensor]:
    """Every tensor of a result, by name."""
    found = {}
    for field in dataclasses.fields(out):  # type: ignore[arg-type]
        value = getattr(out, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        else:
            found |= {f"{field.name}.{name}": part for name, part in parts(value).items()}
    return found


STEPS = [
    [(0, 1)],
    [(130, 1), (0, 1), (3, 1), (255, 1)],
    [(0, 7), (126, 5), (40, 1)],
    [(511, 3), (0, 30), (6, 2)],
]


@pytest.mark.parametrize("lengths", STEPS)
@pytest.mark.parametrize("padding", [{}, {"pad": 3, "pages": 5, "tokens": 40}, {"chain": 140}])
def test_it_says_what_the_reference_says(
    lengths: list[tuple[int, int]], padding: dict[str, int], device: str
) -> None:
    spans, sizes = given(lengths, device, **padding)
    got, want = parts(run(spans, sizes, "triton")), parts(run(spans, sizes, "reference"))
    for name, value in want.items():
        if value.dtype == torch.int32:
            assert torch.equal(got[name], value), name
        else:  # sines of the same float32 angles, by two libraries
            assert (got[name] - value).abs().max() <= 2.0**-22 if value.numel() else True, name


def test_a_list_is_what_a_token_attends_to(device: str) -> None:
    """Written out: a token at position 130 of the second sequence, the window of 12, pages of 4."""
    spans, sizes = given([(5, 1), (130, 1)], device)
    out = run(spans, sizes)
    assert out.position.tolist() == [5, 130] and out.sequence.tolist() == [0, 1]
    window = [(1001 + place // 4 - 29 + 290) * 4 + place % 4 for place in range(119, 131)]
    assert out.window.index[1].tolist() == window
    assert int(out.window_rows[1]) == window[-1]
    assert out.c4_visible.tolist() == [1, 32] and out.c4.lengths.tolist() == [13, 22]
    entries = [BASE + (1001 + entry // 4) * 4 + entry % 4 for entry in range(10)]
    assert out.c4.index[1].tolist() == window + entries
    assert out.c4.index[0, 12:].tolist() == [BASE + 4] + [-1] * 9
    assert out.c128.index[1].tolist() == [*window, BASE // 2 + 1001 * 4]
    assert out.c128.lengths.tolist() == [6, 13]


def test_entries_are_those_that_the_step_completes(device: str) -> None:
    spans, sizes = given([(126, 7), (2, 1), (0, 1), (3, 1)], device, pad=2)
    out = run(spans, sizes)
    assert out.c4_entries.sequence.tolist() == [0, 0, 3, -1, -1]
    assert out.c4_entries.number.tolist() == [31, 32, 0, 0, 0]
    assert out.c4_entries.key_target.tolist()[:3] == [(1 + 7) * 4 + 3, (1 + 8) * 4, 3001 * 4]
    assert out.c4_entries.target.tolist()[0] == BASE + (1 + 7) * 4 + 3
    assert out.c128_entries.sequence.tolist() == [0, -1, -1]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_token_has_the_same_lists_in_every_step(implementation: str, device: str) -> None:
    """Alone and padded, in a chunk and among others: to the bit, rotations too."""
    whole = run(*given([(60, 70)], device), implementation)
    for at in (60, 63, 127, 129):
        alone = run(*given([(at, 1)], device, pad=3, tokens=8, pages=2), implementation)
        for name in ("position", "c4_visible", "plain", "compressed"):
            assert same_bits(getattr(alone, name)[:1], getattr(whole, name)[at - 60 : at - 59]), (name, at)
        for name in ("window", "c4", "c128"):
            one, all_of = getattr(alone, name), getattr(whole, name)
            length = int(one.lengths[0])
            assert length == int(all_of.lengths[at - 60])
            # Rows of the window are numbered from the first page that is needed, which differs.
            begin = WINDOW if length > WINDOW else length
            assert torch.equal(one.index[0, begin:length], all_of.index[at - 60, begin:length]), (name, at)
        assert (alone.window.lengths[1:] == 0).all() and (alone.c4.index[1:] == -1).all()


def test_positions_up_to_a_million(device: str) -> None:
    """The angle is one float32 product; its cosine and sine are right to the last bits, however large it is."""
    positions = [1_048_575, 999_999, 105_617, 70_000]
    spans, sizes = given([(position, 1) for position in positions], device)
    out = run(spans, sizes, "triton")
    angle = (torch.tensor(positions).float()[:, None] * FREQUENCIES).double()
    want = torch.cat((angle.cos(), angle.sin()), 1)
    assert (out.plain.double().cpu() - want).abs().max() <= 2.0**-22
    assert out.c128.index[0, -1] == BASE // 2 + (1 + 8191 // 4) * 4 + 8191 % 4
    last = out.c128.index[1, WINDOW:]
    assert (last[999_999 // 128 + 1 :] == -1).all() and (last[: 1_000_000 // 128] > 0).all()


def test_models_without_compressed_layers(device: str) -> None:
    spans, sizes = given([(20, 2), (0, 3)], device)
    spans = dataclasses.replace(spans, c4=None, c128=None)
    sizes = dataclasses.replace(sizes, c4_entries=0, c128_entries=0, columns=0)
    out = run(spans, sizes)
    assert out.c4.index.shape == (5, 0) and out.c128.index.shape == (5, 0)
    want = run(*given([(20, 2), (0, 3)], device))
    assert torch.equal(out.window.index, want.window.index) and torch.equal(out.plain, want.plain)


def test_more_sequences_than_are_compared_at_a_time(device: str) -> None:
    lengths = [(i % 9, 1) for i in range(130)]
    got, want = (parts(run(*given(lengths, device, pad=6, tokens=132), name)) for name in ("triton", "reference"))
    assert all(torch.equal(got[name], value) for name, value in want.items() if value.dtype == torch.int32)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_last_streams(implementation: str, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(20, 24, device=device).to(dtype)
    ids = torch.tensor([3, -1, 19, 3], dtype=torch.int32, device=device)
    h = embed_streams(weight, ids, 4, implementation=implementation)
    assert torch.equal(h, weight[ids.clamp_min(0).long()][:, None].repeat(1, 4, 1) * (ids >= 0)[:, None, None])
    kept = torch.full((6, 4, 24), 7.0, device=device).to(dtype)
    source = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    target = torch.tensor([5, 0, 1], dtype=torch.int32, device=device)
    store_rows(h, source, target, kept, implementation=implementation)
    assert torch.equal(kept[5], h[2]) and torch.equal(kept[1], h[0]) and (kept[[0, 2, 3, 4]] == 7.0).all()


def test_nothing_to_do(device: str) -> None:
    ids = torch.zeros(0, dtype=torch.int32, device=device)
    weight = torch.ones(3, 8, device=device)
    assert embed_streams(weight, ids, 2).shape == (0, 2, 8)
    store_rows(torch.ones(2, 8, device=device), ids, ids, weight)
    assert (weight == 1).all()


def test_bytes_moved(device: str) -> None:
    """Beside what is written, a program reads its sequence's numbers and the page of every row: a number for each,
    where the least is a number for each page."""
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    spans, sizes = given([(1000 + i, 1) for i in range(4)], device, window=128)
    with traffic() as moved:
        run(spans, sizes, "triton")
    assert moved.stored <= 1.1 * least_bytes(spans, sizes, 16)
    assert moved.total <= 2.2 * least_bytes(spans, sizes, 16)
