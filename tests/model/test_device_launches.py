"""How many kernels a decode step launches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.device import DEVICE, checkpoint, on_stored, references, tokens_for
from support.run import pools_for, step
from weft.kernels.gpu import interpreter
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.cuda.block import Block

MOST = {"window": 14, "c128a": 16, "c4a": 20}
# The step's own: input, index tensors, embedding; streams, their last rows, and the copy that the caller keeps.
AROUND = 7


@pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU benchmarks/step_gpu.py counts the nodes of the captured graph"
)
def test_launches_of_a_decode_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel and every op of torch that would be one; none waits for the device."""
    interpreter.install()
    model = on_stored(checkpoint(tmp_path, 0, 0, 4, 128), torch.bfloat16)
    ids = tokens_for(model, 30)
    state = SequenceState(pools_for(model, [ids], 16, "fp8", "fp8"))
    with references(everywhere=True):
        step(model, [(state, ids[:28])])
    counts: dict[str, list[str]] = {}
    run: Callable[..., object] = Block.__call__

    def counted(block: Block, *args: object) -> object:
        with interpreter.launches() as inside:
            out = run(block, *args)
        counts[block.attn.kind] = inside.names
        return out

    monkeypatch.setattr(Block, "__call__", counted)
    with interpreter.launches() as whole:
        step(model, [(state, ids[28:29])])
    assert set(counts) == set(MOST)
    for kind, names in counts.items():
        assert len(names) <= MOST[kind], (kind, names)
        assert not any(name.startswith("aten.") for name in names), (kind, names)
    inside = sum(map(len, counts.values()))
    assert len(whole.names) - inside <= AROUND, whole.names
    assert "aten._local_scalar_dense" not in whole.names
