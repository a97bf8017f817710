"""Made-up weights: random, but the same on every call, and scaled so that the model is lively.

Lively means: activations and logits near unit size, attention sinks, gates and hyper-connections
that matter, routing that differs between tokens. A wrong kernel then shows in the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from weft.runtime.checkpoint.layout import Weight, stored_weights, weights
from weft.runtime.checkpoint.reader import runtime_dtype
from weft.runtime.checkpoint.writer import DEFAULT_SHARD_BYTES, write_official
from weft.runtime.config import ModelConfig

_STD = {"embed": 1.0, "hc_base": 0.5, "sink": 1.0, "ape": 0.5, "bias": 0.1}
_NORM_SPREAD = 0.1


def dummy_weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every weight of `config` by official name, in the dtypes `Checkpoint.load` gives.

    A tensor depends on `seed`, its name and its shape only, not on the other tensors.
    """
    made = DummyWeights(config, seed)
    return {w.name: made[w.name].to(runtime_dtype(w, dtype)) for w in weights(config)}


def write_dummy_checkpoint(
    path: Path | str,
    config: ModelConfig,
    seed: int,
    *,
    tokenizer_json: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write `DummyWeights(config, seed)` in the official layout; see `write_official`."""
    write_official(
        path,
        config,
        DummyWeights(config, seed),
        tokenizer_json=tokenizer_json,
        max_shard_bytes=max_shard_bytes,
    )


class DummyWeights(Mapping[str, Tensor]):
    """Everything a checkpoint holds, each made when it is asked for: float32, expert tables int64."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._experts = config.n_routed_experts
        self._seed = seed
        self._weights = {weight.name: weight for weight in stored_weights(config)}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        generator = Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return _make(weight, self._experts, generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _make(weight: Weight, experts: int, generator: Generator) -> Tensor:
    if weight.role == "expert_table":
        tokens, picks = weight.shape
        order = torch.rand(tokens, experts, generator=generator).argsort(dim=1, stable=True)
        return order[:, :picks].contiguous()
    if weight.role == "hc_scale":
        return torch.empty(weight.shape).uniform_(0.1, 1.0, generator=generator)
    noise = torch.randn(weight.shape, generator=generator)
    if weight.role == "norm":
        return 1 + _NORM_SPREAD * noise
    if weight.role in ("linear", "hc_fn"):
        # Unit input gives unit output; the hidden state before `head` is normalised: unit logits.
        return torch.mul(noise, weight.shape[-1] ** -0.5)
    return _STD[weight.role] * noise
