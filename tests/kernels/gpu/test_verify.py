"""Raw state saved before drafts and put back behind those that are kept."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.gpu.interpreter import traffic
from weft.kernels.gpu.verify import least_bytes, save_tails, take_back

SLOTS, WIDTH, DIM = 7, 40, 12
# (slot, first position, rows, rows kept)
DRAFTS = [(3, 5, 4, 1), (0, 126, 3, 2), (6, 0, 8, 7), (2, 127, 2, 1), (5, 1000, 4, 3)]


def state(device: str, layers: int = 3, folds: int = 2) -> dict[str, torch.Tensor]:
    return {
        "tail": torch.randn(layers, SLOTS, 8, WIDTH, device=device),
        "fold": torch.randn(folds, SLOTS, 3, DIM, device=device),
        "streams": torch.randn(SLOTS, 4, 24, device=device).bfloat16(),
    }


def numbers(device: str, *values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("layers", "folds"), [(3, 2), (0, 2), (3, 0)])
def test_state_is_as_if_only_what_is_kept_had_run(
    implementation: str, layers: int, folds: int, device: str
) -> None:
    """A step overwrites a place per row; what is kept stays, the others have what they had."""
    before = state(device, layers, folds)
    own = {name: tensor.clone() for name, tensor in before.items()}
    slot, start, count, kept = (list(column) for column in zip(*DRAFTS, strict=True))
    offset = [sum(count[:i]) for i in range(len(count))]
    saved = save_tails(own["tail"], *numbers(device, slot, start), max(count) - 1, implementation=implementation)
    behind = torch.randn(folds, sum(count), 3, DIM, device=device)
    h = torch.randn(sum(count), 4, 24, device=device).bfloat16()
    want = {name: tensor.clone() for name, tensor in before.items()}
    for i, (at, first, rows, right) in enumerate(DRAFTS):
        for row in range(rows):
            new = torch.full((layers, WIDTH), float(100 * i + row), device=device)
            own["tail"][:, at, (first + row) % 8] = new
            if row < right:
                want["tail"][:, at, (first + row) % 8] = new
        own["fold"][:, at], own["streams"][at] = behind[:, offset[i] + rows - 1], h[offset[i] + rows - 1]
        kept_fold = (first + right) % 128 > 0  # else the next token opens a group, and nothing reads it
        want["fold"][:, at] = behind[:, offset[i] + (right if kept_fold else rows) - 1]
        want["streams"][at] = h[offset[i] + right - 1]
    told = numbers(device, list(range(len(DRAFTS))), slot, start, count, kept, offset)
    last = h[[first + right - 1 for first, right in zip(offset, kept, strict=True)]]
    take_back(own["tail"], saved, own["fold"], behind, own["streams"], last, told, implementation=implementation)
    for name, tensor in want.items():
        assert torch.equal(own[name], tensor), name


def test_nothing_taken_back(device: str) -> None:
    own = state(device)
    before = own["streams"].clone()
    none = torch.zeros(0, dtype=torch.int32, device=device)
    saved = save_tails(own["tail"], none, none, 2)
    assert saved.shape == (3, 0, 2, WIDTH)
    told, h = torch.zeros(6, 0, dtype=torch.int32, device=device), own["streams"][:0]
    take_back(own["tail"], saved, own["fold"], torch.zeros(2, 0, 3, DIM, device=device), own["streams"], h, told)
    assert torch.equal(own["streams"], before)


def test_bytes_moved(device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    tail, fold = torch.zeros(2, 4, 8, 2560), torch.zeros(2, 4, 3, 512)
    streams = torch.zeros(4, 4, 4096).bfloat16()
    saved = save_tails(tail, *numbers(device, [1, 3], [9, 70]), 1)
    told = numbers(device, [0, 1], [1, 3], [9, 70], [2, 2], [1, 1], [0, 2])
    with traffic() as moved:
        take_back(tail, saved, fold, torch.zeros(2, 4, 3, 512), streams, streams[:2].clone(), told)
    assert moved.total <= 1.3 * least_bytes(tail, fold, streams, 2, 2)
