"""One layer of each kind at V4-Flash's dimensions against transformers."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from support import hf
from support.run import run
from weft.kernels import linear
from weft.kernels.moe import Expert
from weft.runtime.config import LayerKind
from weft.runtime.model import ffn
from weft.runtime.model.model import Model
from weft.runtime.model.weights import Weights


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> list[hf.FullWidth]:
    """256 experts are views of one buffer in the test's weights: keep them views instead of packing 25 GB."""
    made: list[hf.FullWidth] = []
    count = iter(range(1 << 20))

    def expert(weights: Weights) -> Expert:
        number = next(count)
        if number == made[0].config.n_routed_experts:  # the shared expert comes last
            return Expert(weights.linear("w1.weight", "w3.weight"), weights.linear("w2.weight"))
        return Expert(linear.Linear(made[0].gate_up[number]), linear.Linear(made[0].down[number]))

    monkeypatch.setattr(ffn, "_expert", expert)
    plans = [linear.LinearPlan("padded", m) for m in (4, 8, 16)]
    monkeypatch.setattr(linear, "candidates", lambda n, k, dtype: plans)
    linear.choose.cache_clear()
    yield made
    linear.choose.cache_clear()


@pytest.mark.parametrize(
    ("kind", "hashed", "topk", "length"),
    [("window", True, 512, 140), ("c4a", False, 16, 140), ("c128a", False, 512, 260)],
)
def test_a_flash_layer(
    shared_memory: list[hf.FullWidth], kind: LayerKind, hashed: bool, topk: int, length: int
) -> None:
    layer = hf.full_width_layer(kind, hashed=hashed, index_topk=topk)
    shared_memory.append(layer)
    weights: Mapping[str, Tensor] = layer.weights
    ids = torch.randint(0, layer.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = hf.hf_logits(layer.model, ids)
    ours = run(Model(layer.config, weights), ids, chunks=(100, 1, 50))
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.std()))
