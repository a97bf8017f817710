"""Every tensor of a DeepSeek-V4 checkpoint: name, shape, stored format, and the part it plays.

The official layout has no `model.` prefix. A quantised matrix is stored as two tensors, `X.weight`
and `X.scale`; `Weight` is the matrix they stand for and `TensorSpec` one stored tensor. Reader,
writer, dummy weights and sizes all take their knowledge from here. Source: the tensor listings of
the released V4-Flash, V4-Pro and V4-Flash-0731 (69,187, 145,116 and 72,317 tensors, reproduced by
the tests). The last keeps draft stages where the others keep the MTP block: `draft_weights`.

Torch is not imported: the command line prints sizes with this module alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from weft.runtime.config import C4, ModelConfig
from weft.runtime.errors import ConfigError

Storage = Literal["bf16", "f32", "i64", "fp8", "fp4"]
Role = Literal["embed", "linear", "norm", "hc_fn", "hc_base", "hc_scale", "sink", "ape", "bias", "expert_table"]

FP8_BLOCK = 128  # rows and columns that share one scale of an FP8 matrix
FP4_GROUP = 32  # columns that share one scale of an FP4 row

# Matrices the model multiplies in float32 whatever dtype it runs in: logits, routing, compression.
FLOAT32_LINEARS = ("head.weight", "gate.weight", "compressor.wkv.weight", "compressor.wgate.weight")

# safetensors dtype name -> bytes per element
DTYPE_BYTES = {
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "I32": 4,
    "I64": 8,
}
_PLAIN_DTYPE = {"bf16": "BF16", "f32": "F32", "i64": "I64"}


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor; `dtype` is spelled as in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class Weight:
    """One tensor of the model: `shape` once dequantised, `storage` as the releases keep it."""

    name: str
    shape: tuple[int, ...]
    storage: Storage
    role: Role

    @property
    def is_float32(self) -> bool:
        """Whether the model wants it in float32 whatever dtype it runs in."""
        if self.role in ("embed", "linear"):
            return self.name.endswith(FLOAT32_LINEARS)
        return self.role != "expert_table"

    def tensors(self, storage: Storage | None = None) -> tuple[TensorSpec, ...]:
        """The tensors that store it in `storage` (by default its own): values, then scales."""
        storage = storage or self.storage
        if storage == "fp8":
            grid = tuple(ceil_div(size, FP8_BLOCK) for size in self.shape)
            return (
                TensorSpec(self.name, "F8_E4M3", self.shape),
                TensorSpec(scale_name(self.name), "F8_E8M0", grid),
            )
        if storage == "fp4":
            rows, columns = self.shape
            return (
                TensorSpec(self.name, "I8", (rows, ceil_div(columns, 2))),
                TensorSpec(scale_name(self.name), "F8_E8M0", (rows, ceil_div(columns, FP4_GROUP))),
            )
        return (TensorSpec(self.name, _PLAIN_DTYPE[storage], self.shape),)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def scale_name(weight_name: str) -> str:
    """`a.b.weight` -> `a.b.scale`."""
    assert weight_name.endswith(".weight"), weight_name
    return weight_name.removesuffix("weight") + "scale"


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every stored tensor of the official layout, in file order; raises what `weights` does."""
    for weight in stored_weights(config):
        yield from weight.tensors()


def stored_weights(config: ModelConfig) -> Iterator[Weight]:
    """Every weight a checkpoint holds, in file order: those of the model, then draft stages."""
    yield from weights(config)
    yield from draft_weights(config)


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every weight of the model Weft runs, in file order: top level, layers, MTP blocks.

    Without `quantization_config` all matrices are bf16. Raises `ConfigError` for a block size other
    than the released one and for FP4 matrices with an odd number of columns.
    """
    _check(config)
    dim, streams = config.hidden_size, config.hc_mult
    yield Weight("embed.weight", (config.vocab_size, dim), "bf16", "embed")
    yield Weight("head.weight", (config.vocab_size, dim), "bf16", "linear")
    yield _norm("norm", dim)
    yield from _hyper_connection("hc_head", streams, streams * dim, scales=1)
    for layer in range(config.num_hidden_layers):
        hashed = config.is_hash_layer(layer)
        yield from _block(config, f"layers.{layer}", config.compress_ratios[layer], hashed)
    if config.has_mtp:
        for block in range(config.num_nextn_predict_layers):
            yield from _mtp(config, f"mtp.{block}")


def draft_weights(config: ModelConfig) -> Iterator[Weight]:
    """The DSpark draft stages of the refreshed releases, which Weft does not run; else nothing.

    A stage is a window layer without the projections of an MTP block. There is one for every entry
    of `compress_ratios` after the backbone (`num_nextn_predict_layers` stays 1); the first reads the
    target layers, the last makes the logits. Raises `ConfigError` if one of their keys is missing.
    """
    if config.dspark_block_size is None:
        return
    dim, streams = config.hidden_size, config.hc_mult
    rank, targets = config.dspark_markov_rank, config.dspark_target_layer_ids
    if rank is None or targets is None:
        field = "dspark_markov_rank" if rank is None else "dspark_target_layer_ids"
        raise ConfigError(field, None, "missing beside dspark_block_size")
    stages = len(config.compress_ratios) - config.num_hidden_layers
    for stage in range(stages):
        name = f"mtp.{stage}"
        yield from _block(config, name, ratio=0, hashed=False)
        if stage == 0:
            yield _fp8(config, f"{name}.main_proj", dim, len(targets) * dim)
            yield _norm(f"{name}.main_norm", dim)
        if stage == stages - 1:
            yield _norm(f"{name}.norm", dim)
            yield from _hyper_connection(f"{name}.hc_head", streams, streams * dim, scales=1)
            yield Weight(f"{name}.markov_head.markov_w1.weight", (config.vocab_size, rank), "bf16", "embed")
            yield _linear(f"{name}.markov_head.markov_w2", config.vocab_size, rank)
            yield _linear(f"{name}.confidence_head.proj", 1, dim + rank)


def _check(config: ModelConfig) -> None:
    quantisation = config.quantization_config
    if quantisation is None:
        return
    block = quantisation.weight_block_size
    if block != (FP8_BLOCK, FP8_BLOCK):
        raise ConfigError("quantization_config.weight_block_size", block, f"must be {FP8_BLOCK}x{FP8_BLOCK}")
    if config.expert_dtype == "fp4":
        for field in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, field) % 2:
                raise ConfigError(field, getattr(config, field), "must be even: FP4 packs two columns in a byte")


def _norm(name: str, size: int) -> Weight:
    return Weight(f"{name}.weight", (size,), "bf16", "norm")


def _linear(name: str, rows: int, columns: int, storage: Storage = "bf16") -> Weight:
    return Weight(f"{name}.weight", (rows, columns), storage, "linear")


def _fp8(config: ModelConfig, name: str, rows: int, columns: int) -> Weight:
    return _linear(name, rows, columns, "fp8" if config.quantization_config else "bf16")


def _hyper_connection(name: str, outputs: int, inputs: int, scales: int) -> Iterator[Weight]:
    yield Weight(f"{name}_fn", (outputs, inputs), "f32", "hc_fn")
    yield Weight(f"{name}_base", (outputs,), "f32", "hc_base")
    yield Weight(f"{name}_scale", (scales,), "f32", "hc_scale")


def _block(config: ModelConfig, name: str, ratio: int, hashed: bool) -> Iterator[Weight]:
    dim = config.hidden_size
    for part in ("attn", "ffn"):
        yield _norm(f"{name}.{part}_norm", dim)
        mixer = f"{name}.hc_{part}"
        yield from _hyper_connection(mixer, config.hc_mix_size, config.hc_mult * dim, scales=3)
    yield from _attention(config, f"{name}.attn", ratio)
    yield from _experts(config, f"{name}.ffn", hashed)


def _attention(config: ModelConfig, name: str, ratio: int) -> Iterator[Weight]:
    dim, rank, head = config.hidden_size, config.q_lora_rank, config.head_dim
    width = config.num_attention_heads * head
    lora = config.o_groups * config.o_lora_rank
    yield Weight(f"{name}.attn_sink", (config.num_attention_heads,), "f32", "sink")
    yield _norm(f"{name}.q_norm", rank)
    yield _norm(f"{name}.kv_norm", head)
    yield _fp8(config, f"{name}.wq_a", rank, dim)
    yield _fp8(config, f"{name}.wq_b", width, rank)
    yield _fp8(config, f"{name}.wkv", head, dim)
    yield _fp8(config, f"{name}.wo_a", lora, width // config.o_groups)
    yield _fp8(config, f"{name}.wo_b", dim, lora)
    if ratio:
        yield from _compressor(f"{name}.compressor", ratio, dim, head)
    if ratio == C4:
        heads, index = config.index_n_heads, config.index_head_dim
        yield _fp8(config, f"{name}.indexer.wq_b", heads * index, rank)
        yield _linear(f"{name}.indexer.weights_proj", heads, dim)
        yield from _compressor(f"{name}.indexer.compressor", ratio, dim, index)


def _compressor(name: str, ratio: int, dim: int, head: int) -> Iterator[Weight]:
    # Ratio-4 windows overlap: half of the channels serves the window itself, half the next one.
    width = 2 * head if ratio == C4 else head
    yield Weight(f"{name}.ape", (ratio, width), "f32", "ape")
    yield _linear(f"{name}.wkv", width, dim)
    yield _linear(f"{name}.wgate", width, dim)
    yield _norm(f"{name}.norm", head)


def _experts(config: ModelConfig, name: str, hashed: bool) -> Iterator[Weight]:
    dim, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _linear(f"{name}.gate", count, dim)
    if hashed:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield Weight(f"{name}.gate.tid2eid", table, "i64", "expert_table")
    else:
        yield Weight(f"{name}.gate.bias", (count,), "f32", "bias")
    for matrix, rows, columns in (("w1", inner, dim), ("w2", dim, inner), ("w3", inner, dim)):
        yield _fp8(config, f"{name}.shared_experts.{matrix}", rows, columns)
    storage: Storage = "bf16"
    if config.quantization_config:
        storage = "fp4" if config.expert_dtype == "fp4" else "fp8"
    for expert in range(count):
        yield _linear(f"{name}.experts.{expert}.w1", inner, dim, storage)
        yield _linear(f"{name}.experts.{expert}.w2", dim, inner, storage)
        yield _linear(f"{name}.experts.{expert}.w3", inner, dim, storage)


def _mtp(config: ModelConfig, name: str) -> Iterator[Weight]:
    dim, streams = config.hidden_size, config.hc_mult
    yield from _block(config, name, ratio=0, hashed=False)
    for proj in ("e_proj", "h_proj"):
        yield _fp8(config, f"{name}.{proj}", dim, dim)
    for norm in ("enorm", "hnorm", "norm"):
        yield _norm(f"{name}.{norm}", dim)
    yield from _hyper_connection(f"{name}.hc_head", streams, streams * dim, scales=1)
