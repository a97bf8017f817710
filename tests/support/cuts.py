"""Small models and one long sequence, for tests of state at a cut."""

from __future__ import annotations

import dataclasses
import random
from functools import cache

from torch import Tensor

from support.run import run
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.config import preset
from weft.runtime.model.model import Model


@cache
def model_of(window: int, *ratios: int) -> Model:
    config = dataclasses.replace(
        preset("tiny"),
        sliding_window=window,
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, 0),
        hidden_size=32,
        vocab_size=64,
        n_routed_experts=4,
        moe_intermediate_size=16,
        q_lora_rank=16,
        num_attention_heads=2,
        o_groups=1,
    )
    return Model(config, dummy_weights(config, 1))


@cache
def cold(model: Model, length: int) -> Tensor:
    return run(model, tokens_of(length))


@cache
def cold_last(model: Model, tokens: tuple[int, ...]) -> Tensor:
    """Logits [1, V] behind these tokens."""
    return run(model, tokens)[-1:]


def tokens_of(length: int) -> list[int]:
    return random.Random(7).choices(range(3, 64), k=length)
