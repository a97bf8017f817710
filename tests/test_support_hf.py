"""The transformers oracle: its weights, shapes and decoding."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch

from support.hf import (
    full_width_layer,
    hf_config,
    hf_greedy,
    hf_logits,
    hf_model,
    hf_streams,
    random_config,
    random_weights,
)
from support.reference import reference_forward, tainted_rows
from weft.runtime.config import C4, C128, LayerKind, preset

KINDS = {
    0: "sliding_attention",
    C4: "compressed_sparse_attention",
    C128: "heavily_compressed_attention",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_config_keeps_every_shape() -> None:
    config = preset("tiny")
    theirs = hf_config(config)
    raw = theirs.to_dict()
    assert raw["layer_types"] == [KINDS[ratio] for ratio in config.compress_ratios[:-1]]
    assert raw["mlp_layer_types"] == ["hash_moe"] * 3 + ["moe"] * 4
    for name in ("qk_rope_head_dim", "sliding_window", "swiglu_limit", "index_topk", "hc_eps"):
        assert getattr(theirs, name) == getattr(config, name)
    assert config.rope_scaling is not None
    yarn, scaling = raw["rope_parameters"]["compress"], dataclasses.asdict(config.rope_scaling)
    assert {name: yarn[name] for name in scaling} == scaling
    assert yarn["attention_factor"] == 1.0
    assert (theirs._attn_implementation, theirs._experts_implementation) == ("eager", "eager")


def test_yarn_factor_warning_is_not_logged() -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        # transformers warns once per message: this length is used nowhere else.
        hf_config(dataclasses.replace(preset("tiny"), max_position_embeddings=65539))
    finally:
        logger.removeHandler(handler)
    assert seen == []


def test_greedy_with_the_cache_is_greedy_without() -> None:
    config = preset("tiny")
    model = hf_model(config, random_weights(config, seed=0))
    ids = torch.randint(0, config.vocab_size, (126,), generator=torch.Generator().manual_seed(0)).tolist()
    picked = hf_greedy(model, ids, 5)  # crosses the first c128a entry
    logits = hf_logits(model, ids + picked)
    assert picked == logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
    assert len(set(picked)) > 1


def test_streams_come_with_the_plain_logits() -> None:
    config = preset("tiny")
    model = hf_model(config, random_weights(config, seed=0))
    streams, logits = hf_streams(model, [5, 6, 7])
    assert streams.shape == (3, config.hc_mult, config.hidden_size)
    assert torch.equal(logits, hf_logits(model, [5, 6, 7]))


def test_random_weights_are_repeatable_and_lively() -> None:
    config = preset("tiny")
    first, again, other = (random_weights(config, seed) for seed in (3, 3, 4))
    assert first.keys() == other.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name]), name
        assert value.dtype == (torch.int64 if name.endswith("tid2eid") else torch.float32)
        assert value.numel() == 1 or value.double().std() > 0, name
    picks = first["layers.0.ffn.gate.tid2eid"]
    assert picks.shape == (config.vocab_size, config.num_experts_per_tok)
    assert (picks.sort(dim=1).values.diff(dim=1) > 0).all()


def test_random_weights_have_the_released_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in random_weights(preset("tiny"), 0).items()}
    assert shapes["layers.2.attn.compressor.ape"] == (4, 128)
    assert shapes["layers.2.attn.compressor.wkv.weight"] == (128, 128)
    assert shapes["layers.2.attn.indexer.compressor.wgate.weight"] == (64, 128)
    assert shapes["layers.2.attn.indexer.compressor.norm.weight"] == (32,)
    assert shapes["layers.3.attn.compressor.ape"] == (128, 64)
    assert shapes["layers.3.attn.wo_a.weight"] == (48, 128)
    assert shapes["layers.3.ffn.experts.7.w2.weight"] == (128, 64)
    assert shapes["mtp.0.hc_head_scale"] == (1,)
    assert shapes["mtp.0.hc_attn_fn"] == (24, 512)
    per_layer = 2 + 6 + 8 + 2 + 3 + 8 * 3  # norms, hyper-connections, attention, gate, shared, routed
    compressors = 3 * (4 + 4 + 2) + 2 * 4  # three c4a layers, two c128a
    assert len(shapes) == 6 + 7 * per_layer + compressors + per_layer + 4 + 4  # top, layers, MTP


def test_random_configs_vary() -> None:
    configs = [random_config(seed) for seed in range(60)]
    assert configs == [random_config(seed) for seed in range(60)]
    for config in configs[::2]:
        assert {C4, C128} <= set(config.compress_ratios)
    assert {len(config.compress_ratios) for config in configs} == {4, 5, 6, 7, 8}
    assert all(config.compress_ratios[-1] == 0 and config.has_mtp for config in configs)
    assert {config.index_topk for config in configs} == {4, 8, 16, 300}
    assert any(config.hidden_size % 32 for config in configs)
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.num_hash_layers for config in configs} == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "hashed", "tokens"), [("window", False, 5), ("c4a", True, 12), ("c128a", True, 130)]
)
def test_full_width_layer_shares_memory_and_agrees(kind: LayerKind, hashed: bool, tokens: int) -> None:
    layer = full_width_layer(kind, hashed=hashed, index_topk=1)
    held = layer.model.model.layers[0].mlp.experts
    assert held.gate_up_proj.data_ptr() == layer.gate_up.data_ptr()
    assert held.down_proj.data_ptr() == layer.down.data_ptr()
    last = layer.weights["layers.0.ffn.experts.255.w3.weight"]
    assert torch.equal(held.gate_up_proj[255, 2048:], last)
    assert last.untyped_storage().nbytes() < 2**27
    # Two token ids: hashed layers then touch few experts, which the reference has to convert.
    ids = torch.randint(0, 2, (tokens,), generator=torch.Generator().manual_seed(0))
    expected = reference_forward(layer.config, layer.weights, ids)
    clean = ~tainted_rows(expected.margins, 2e-5)
    assert clean.any()
    assert (hf_logits(layer.model, ids) - expected.logits)[clean].abs().max() < 1e-4
