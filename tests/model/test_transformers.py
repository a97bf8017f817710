"""The model against transformers' DeepseekV4ForCausalLM: same random weights, float32."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor

from support import hf
from support.reference import reference_forward, tainted_rows
from support.run import greedy, run
from weft.runtime.config import ModelConfig, preset
from weft.runtime.model.model import Model

LENGTHS = (1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 257, 300, 1000)
SEEDS = range(20)
TOLERANCE = 1e-4  # on logits of unit standard deviation
NEAR_TIE = 1e-5
MAX_TAINTED = 0.005
STEPS = 200


@cache
def config_of(seed: int) -> ModelConfig:
    return preset("tiny") if seed == 0 else hf.random_config(seed)


def tokens(config: ModelConfig, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


def differing_rows(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).abs().amax(1) > TOLERANCE * max(1.0, float(theirs.std()))


def test_the_configs_cover_what_they_should() -> None:
    configs = [config_of(seed) for seed in SEEDS]
    kinds = {kind for config in configs for kind in config.layer_kinds}
    assert kinds == {"window", "c4a", "c128a"}
    assert {config.sliding_window for config in configs} == {32, 128}
    assert min(config.index_n_heads for config in configs) >= 16
    entries = max(LENGTHS) // 4
    assert any(config.index_topk < entries for config in configs)
    assert any(config.index_topk >= entries for config in configs)
    assert len({config.num_hash_layers for config in configs}) >= 3
    assert {config.rope_scaling is None for config in configs} == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_agree_at_every_length(seed: int) -> None:
    config = config_of(seed)
    weights = hf.random_weights(config, seed)
    model, theirs = Model(config, weights), hf.hf_model(config, weights)
    excluded = rows = 0
    for length in LENGTHS:
        ids = tokens(config, length, seed)
        bad = differing_rows(run(model, ids), hf.hf_logits(theirs, ids))
        rows += length
        if bad.any():
            reference = reference_forward(config, weights, torch.tensor(ids))
            tainted = tainted_rows(reference.margins, NEAR_TIE)
            assert not (bad & ~tainted).any(), f"length {length}: rows {bad.nonzero()[:, 0].tolist()[:10]} differ"
            excluded += int(bad.sum())
    assert excluded <= MAX_TAINTED * rows, f"{excluded} of {rows} rows lie behind near-ties"


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_tokens_are_equal_for_200_steps(seed: int) -> None:
    config = config_of(seed)
    weights = hf.random_weights(config, seed)
    prompt = tokens(config, 100 + 7 * seed, seed)
    theirs = hf.hf_greedy(hf.hf_model(config, weights), prompt, STEPS)
    assert greedy(Model(config, weights), prompt, STEPS) == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bfloat16_follows_float32(dtype: torch.dtype) -> None:
    """Not equal (routing and top-k flip on rounding), but the same model: most argmaxes agree."""
    config = preset("tiny")
    weights = hf.random_weights(config, 3)
    ids = tokens(config, 300, 3)
    wide, narrow = run(Model(config, weights), ids), run(Model(config, weights, dtype=dtype), ids)
    assert (wide - narrow).abs().mean() < 0.1
    assert (wide.argmax(1) == narrow.argmax(1)).float().mean() > 0.8


@pytest.mark.parametrize("quantity", ["window", "hash", "topk"])
def test_a_planted_difference_is_seen(quantity: str) -> None:
    """The comparison would notice a model that is slightly another one."""
    config = preset("tiny")
    weights = hf.random_weights(config, 1)
    other = {
        "window": dataclasses.replace(config, sliding_window=31),
        "hash": dataclasses.replace(config, routed_scaling_factor=1.51),
        "topk": dataclasses.replace(config, index_topk=9),
    }[quantity]
    ids = tokens(config, 129, 1)
    assert differing_rows(run(Model(other, weights), ids), run(Model(config, weights), ids)).any()
