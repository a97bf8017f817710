"""Dummy weights: the same on every call, and at the scale they promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from weft.runtime.checkpoint.dummy import DummyWeights, dummy_weights
from weft.runtime.checkpoint.layout import weights
from weft.runtime.config import ModelConfig, preset


def test_a_tensor_depends_on_seed_and_name_only(config: ModelConfig) -> None:
    made = dummy_weights(config, 3)
    lazily = DummyWeights(config, 3)
    torch.manual_seed(99)
    assert list(made) == list(lazily) and len(made) == len(lazily)
    for name in reversed(list(made)):
        assert torch.equal(made[name], lazily[name])
    deeper = dataclasses.replace(config, n_routed_experts=4, vocab_size=64, o_groups=1)
    other = dummy_weights(deeper, 3)
    assert torch.equal(other["layers.1.attn.wq_a.weight"], made["layers.1.attn.wq_a.weight"])


def test_seeds_and_names_differ(config: ModelConfig) -> None:
    made, other = dummy_weights(config, 3), dummy_weights(config, 4)
    assert not any(torch.equal(made[name], other[name]) for name in made)
    first = made["layers.0.ffn.experts.0.w1.weight"]
    assert not torch.equal(first, made["layers.0.ffn.experts.1.w1.weight"])
    assert not torch.equal(first, made["layers.0.ffn.experts.0.w3.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(config: ModelConfig, dtype: torch.dtype) -> None:
    made = dummy_weights(config, 0, dtype)
    for weight in weights(config):
        tensor = made[weight.name]
        assert tuple(tensor.shape) == weight.shape
        if weight.role == "expert_table":
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == (torch.float32 if weight.is_float32 else dtype)


def test_expert_tables_name_distinct_experts() -> None:
    config = preset("tiny")
    table = DummyWeights(config, 0)["layers.0.ffn.gate.tid2eid"]
    assert int(table.min()) == 0 and int(table.max()) == config.n_routed_experts - 1
    ordered = table.sort(dim=1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


def test_scales() -> None:
    config = preset("tiny")
    made = DummyWeights(config, 0)

    def std(name: str) -> float:
        return float(made[name].std())

    dim = config.hidden_size
    assert std("embed.weight") == pytest.approx(1, rel=0.05)
    assert std("head.weight") * dim**0.5 == pytest.approx(1, rel=0.05)
    assert std("layers.0.ffn.experts.0.w2.weight") * 64**0.5 == pytest.approx(1, rel=0.05)
    assert std("layers.0.hc_attn_fn") * (4 * dim) ** 0.5 == pytest.approx(1, rel=0.05)
    assert std("layers.2.attn.compressor.ape") == pytest.approx(0.5, rel=0.2)
    assert 0 < std("layers.3.ffn.gate.bias") < 0.3
    norm = made["layers.1.attn_norm.weight"]
    assert float(norm.mean()) == pytest.approx(1, abs=0.05) and 0.05 < float(norm.std()) < 0.2
    scale = made["layers.1.hc_ffn_scale"]
    assert bool(((scale >= 0.1) & (scale <= 1)).all())


def test_logits_are_about_unit_size() -> None:
    config = preset("tiny")
    made = DummyWeights(config, 0)
    x = torch.nn.functional.rms_norm(torch.randn(50, config.hidden_size), (config.hidden_size,))
    logits = (x * made["norm.weight"]) @ made["head.weight"].T
    assert float(logits.std()) == pytest.approx(1, rel=0.1)
