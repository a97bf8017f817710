"""The model on FP8 and FP4 weights as a checkpoint stores them, beside the CPU model on their values.

The CPU model (`support.rounded`) rounds activations where the kernels do; it knows nothing else of their formats.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.device import DEVICE, checkpoint, logits_of, on_stored, references, tokens_for
from support.rounded import round_activations
from weft.runtime.model.model import Model

RATIOS = [(0,), (4,), (128,), (0, 4)]


def difference(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Of each row, the largest."""
    return (got - want).abs().amax(1) / max(1.0, float(want.std()))


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("seed", [0, 1])
def test_stored_weights_give_what_their_values_give(tmp_path: Path, seed: int, ratios: tuple[int, ...]) -> None:
    """One layer or two: a value that is rounded the other way moves those of the next layer by 2^-4, so that
    behind many layers all rows are off by what their formats hold. Without rounded activations every row is."""
    found = checkpoint(tmp_path, seed, *ratios)
    host = Model(found.config, dict(found.load(torch.float32)), quant_sim=True)
    ids = tokens_for(host, 150, seed)
    plain = logits_of(host, ids)
    with references():
        got = logits_of(on_stored(found), ids, (100, 1, 30))
    # On a GPU attention takes its products in float16.
    bound = 1e-3 if DEVICE == "cpu" else 0.3
    assert float(difference(got, logits_of(round_activations(host), ids)).quantile(0.9)) <= bound
    assert float(difference(got, plain).quantile(0.1)) >= 0.03


def test_fp4_experts_multiply_as_their_fp8_form(tmp_path: Path) -> None:
    """Which holds the same values (`lossless_fp8`)."""
    found = checkpoint(tmp_path, 0, 0, 4)
    ids = tokens_for(on_stored(found), 60)
    with references():
        eight, four = (logits_of(on_stored(found, experts=form), ids) for form in ("fp8", "fp4"))
    assert float(difference(four, eight).quantile(0.9)) <= 1e-3


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, 0, 0, 4)
    with references():
        wide, narrow = on_stored(found), on_stored(found, torch.bfloat16)
        ids = tokens_for(wide, 150)
        a, b = logits_of(wide, ids), logits_of(narrow, ids)
    assert (a - b).abs().mean() < 0.15
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.8
