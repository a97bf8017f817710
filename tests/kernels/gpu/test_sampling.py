"""Sampling kernels against brute force. What draws become of it: tests/decoding/test_device_sampler.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from support.interpreted import quick_calls
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.sampling import (
    BLOCK,
    REJECTED,
    Edits,
    Masks,
    Scores,
    apply_bitmask,
    distribution_rows,
    draft_matches,
    judge_rows,
    least_bytes,
    sample_rows,
)
from weft.kernels.reference.sampling import adjusted_row, example, settings_of
from weft.kernels.triton import sampling_cut

INFINITY = torch.inf


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with quick_calls():
        yield


def words_of(allowed: Tensor, device: str) -> Tensor:
    """[g, V] bool -> llguidance's words."""
    rows, width = allowed.shape
    padded = torch.zeros(rows, -(-width // 32) * 32, dtype=torch.int64)
    padded[:, :width] = allowed
    words = (padded.view(rows, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).to(device)


def edited(width: int, device: str) -> Scores:
    """Four rows: edits over two blocks; a mask; both; and both, where the edits leave nothing of the mask."""
    logits = torch.randn(4, width) * 2
    allowed = torch.rand(2, width) < 0.4
    allowed[1] = False
    allowed[1, [3, width - 1]] = True
    tokens = [[0, 5, width - 1], [2, width - 3], [3, width - 1]]
    values = [[[1.3, 0.2, 0.7], [0.5, 0, -INFINITY], [1, 1, 1]], [[2, 0, 0], [1, 0, 3.3]], [[1, 0, -INFINITY]] * 2]
    starts, first = [], 0
    for row in tokens:
        ends = range(0, width + BLOCK, BLOCK)
        starts.append([first + sum(token < end for token in row) for end in ends][: -(-width // BLOCK) + 1])
        first += len(row)
    ints = {"dtype": torch.int32, "device": device}
    edits = Edits(
        torch.tensor([0, 2, 3], **ints),
        torch.tensor([0, -1, 1, 2], **ints),
        torch.tensor(starts, **ints),
        torch.tensor([token for row in tokens for token in row], **ints),
        torch.tensor([value for row in values for value in row], dtype=torch.float32, device=device),
        torch.zeros(3, **ints),
    )
    masks = Masks(words_of(allowed[[0, 0, 1]], device), torch.tensor([-1, 0, 1, 2], **ints))
    return Scores(logits.to(device), masks, edits)


@pytest.mark.parametrize("width", [70, BLOCK + 9])
def test_edits_and_masks(width: int, device: str) -> None:
    """Greedily: each row's winner is moved out of the way in turn, so that many scores are compared."""
    scores = edited(width, device)
    settings = settings_of(temperature=[0.0] * 4, width=width, device=device)
    for _ in range(4):
        got = sample_rows(scores, settings, implementation="triton")
        assert torch.equal(got, sample_rows(scores, settings, implementation="reference"))
        scores.logits[torch.arange(4, device=device), got.long()] -= 9
        if scores.edits is not None:
            scores.edits.left.zero_()
    # The last row has lost all it may have by its edits, so it goes without.
    assert int(adjusted_row(scores, 3).isfinite().sum()) == 2


def test_all_filters_over_blocks(device: str) -> None:
    """Tokens and probabilities; sums of float64 in another order differ by some 1e-16 of their size."""
    width = 2 * BLOCK + 77
    logits = torch.randn(6, width, device=device) * 3
    logits[1::2] = logits[1::2].round()  # many equals
    settings = settings_of(
        temperature=[1.0, 1.3, 0.7, 0.0, 2.0, 1.0],
        top_k=[0, 17, 900, 3, 0, 40],
        top_p=[0.913, 0.807, 1.0, 0.5, 1.0, 0.601],
        min_p=[0.0, 0.0, 0.013, 0.5, 0.11, 0.0],
        width=width,
        device=device,
    )
    scores = Scores(logits)
    got = sample_rows(scores, settings, implementation="triton")
    assert torch.equal(got, sample_rows(scores, settings, implementation="reference"))
    odds = distribution_rows(scores, settings, implementation="triton")
    want = distribution_rows(scores, settings, implementation="reference")
    assert torch.equal(odds > 0, want > 0)
    assert float((odds - want).abs().max()) < 1e-13
    drafts, chances = got.clone(), torch.rand(6, dtype=torch.float64, device=device)
    verdict = judge_rows(scores, settings, drafts, chances, implementation="triton")
    assert torch.equal(verdict, judge_rows(scores, settings, drafts, chances, implementation="reference"))
    assert not settings.counters.any()


def test_the_same_bits_alone_and_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists longer than a tile too: tiles and blocks are a row's own."""
    monkeypatch.setattr(sampling_cut, "TILE", 32)
    width, rows = BLOCK + 100, 3
    logits = torch.randn(rows, width, device=device) * 2

    def odds(order: list[int]) -> Tensor:
        top_k, top_p = [0, 60, 25], [0.33, 0.7, 1.0]
        settings = settings_of(
            temperature=[2.0] * len(order),
            top_k=[top_k[i] for i in order],
            top_p=[top_p[i] for i in order],
            width=width,
            device=device,
        )
        return distribution_rows(Scores(logits[order]), settings, implementation="triton")

    together = odds([0, 1, 2])
    assert torch.equal(odds([2, 0, 1]), together[[2, 0, 1]])
    assert all(torch.equal(odds([i])[0], together[i]) for i in range(rows))
    kept = (together > 0).sum(1).tolist()
    assert kept[0] > 32 and kept[2] == 25


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_bitmask_and_matches(implementation: str, device: str) -> None:
    allowed = torch.rand(2, 70) < 0.5
    slots = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    wide = torch.randn(3, 80, device=device)
    before = wide.clone()
    apply_bitmask(wide[:, :70], Masks(words_of(allowed, device), slots), implementation=implementation)
    assert torch.equal(wide[1], before[1]) and torch.equal(wide[:, 70:], before[:, 70:])
    for row, slot in ((0, 1), (2, 0)):
        want = before[row, :70].cpu().masked_fill(~allowed[slot], -INFINITY)
        assert torch.equal(wide[row, :70].cpu(), want)
    chains = [
        ([1, 2, 3], [1, 2, 3]),
        ([], []),
        ([5, 6], [5, 7]),
        ([REJECTED, 1], [4, 1]),
        ([9] * 70, [9] * 69 + [8]),
    ]
    flat = [torch.tensor([t for c in chains for t in c[i]], dtype=torch.int32, device=device) for i in (0, 1)]
    starts = torch.tensor([0, *(len(c[0]) for c in chains)]).cumsum(0).int().to(device)
    kept = draft_matches(flat[0], flat[1], starts, implementation=implementation)
    assert kept.tolist() == [3, 0, 1, 0, 69]


def test_no_rows(device: str) -> None:
    settings = settings_of(temperature=[], width=8, device=device)
    scores = Scores(torch.zeros(0, 8, device=device))
    assert sample_rows(scores, settings).shape == (0,)
    assert distribution_rows(scores, settings).shape == (0, 8)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert judge_rows(scores, settings, none, none.double()).shape == (0,)
    assert draft_matches(none, none, torch.zeros(1, dtype=torch.int32, device=device)).shape == (0,)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.8, 0.9)])
def test_bytes_moved_at_the_models_width(temperature: float, top_p: float, device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example(1, device, temperature=temperature, top_p=top_p)
    warm, filtered = (len(getattr(given["settings"], name)) for name in ("warm", "filtered"))
    with traffic() as moved:
        got = sample_rows(**given, implementation="triton")
    assert got.tolist() == sample_rows(**given, implementation="reference").tolist()
    if temperature == 0:
        assert got.tolist() == given["scores"].logits.argmax(1).tolist()
    # Every block reads the best of all others (8 bytes each).
    between = 64 * 64 * 8 * (warm + 2 * filtered)
    assert moved.total <= 1.3 * least_bytes(1, 129280, warm=warm, filtered=filtered) + between
