"""Sizes that follow from a config: checkpoint, parameters, KV cache. `weft info` prints them.

Torch is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from weft.runtime.checkpoint.layout import ceil_div, tensor_specs, weights
from weft.runtime.config import C4, C128, KIND_OF_RATIO, ModelConfig

KvFormat = Literal["bf16", "fp8"]
IndexFormat = Literal["bf16", "fp8", "fp4"]

_FP8_KV_GROUP = 64  # nope channels per scale of an fp8 row
_FP8_INDEX_GROUP = 128  # indexer key channels per float32 scale
_FP4_INDEX_GROUP = 32  # indexer key channels per one-byte scale
_ROW_ALIGN = 8


@dataclass(frozen=True)
class Parameters:
    """Parameter counts, without routing tables; `total` and `active` leave the MTP block out.

    `active` is what one token multiplies with: the embedding is a lookup, and of the routed experts
    only `num_experts_per_tok` work. (V4-Flash: 13.3 B of 284.3 B, V4-Pro: 48.9 B of 1573.0 B.)
    """

    total: int
    active: int
    mtp: int


def checkpoint_size(config: ModelConfig) -> tuple[int, int]:
    """Tensors and bytes of the official checkpoint: tensor data, without the file headers.

    V4-Flash: 69,187 and 148.65 GiB, V4-Pro: 145,116 and 805.32 GiB, V4-Flash-0731: 72,317 and
    155.42 GiB.
    """
    sizes = [spec.nbytes for spec in tensor_specs(config)]
    return len(sizes), sum(sizes)


def parameters(config: ModelConfig) -> Parameters:
    """Count parameters of the backbone and of the MTP blocks."""
    total = routed = embed = mtp = 0
    for weight in weights(config):
        size = prod(weight.shape)
        if weight.role == "expert_table":
            continue
        if weight.name.startswith("mtp."):
            mtp += size
            continue
        total += size
        if weight.role == "embed":
            embed += size
        if ".experts." in weight.name:
            routed += size
    working = routed * config.num_experts_per_tok // config.n_routed_experts
    return Parameters(total, total - embed - routed + working, mtp)


def kv_row_bytes(config: ModelConfig, fmt: KvFormat) -> int:
    """Bytes of one attention row (the single KV vector of a token or of a compressed window).

    fp8: e4m3 for the channels without RoPE, bf16 for those with, one scale byte per 64 channels,
    scales padded to 8 bytes: 448 + 128 + 8 = 584 at the released sizes, the row of FlashMLA and
    SGLang.
    """
    if fmt == "bf16":
        return 2 * config.head_dim
    scales = ceil_div(config.nope_head_dim, _FP8_KV_GROUP)
    padded = ceil_div(scales, _ROW_ALIGN) * _ROW_ALIGN
    return config.nope_head_dim + 2 * config.qk_rope_head_dim + padded


def index_row_bytes(config: ModelConfig, fmt: IndexFormat) -> int:
    """Bytes of one indexer key: 256 (bf16), 132 (fp8) or 68 (fp4) at the released 128 channels."""
    size = config.index_head_dim
    if fmt == "bf16":
        return 2 * size
    if fmt == "fp8":
        return size + 4 * ceil_div(size, _FP8_INDEX_GROUP)
    return ceil_div(size, 2) + ceil_div(size, _FP4_INDEX_GROUP)


def kv_bytes(config: ModelConfig, tokens: int, kv: KvFormat = "bf16", index: IndexFormat = "bf16") -> int:
    """Bytes of the KV cache of one sequence of `tokens` tokens, by the published arithmetic.

    Every backbone layer keeps its window; ratio-4 layers add a row and an indexer key per 4 tokens,
    ratio-128 layers a row per 128. Source: the vLLM post on V4, which gives 9.62 GiB for 1,048,576
    tokens of V4-Pro in bf16. Open compression windows, page padding and the MTP block are not
    counted.
    """
    row, key = kv_row_bytes(config, kv), index_row_bytes(config, index)
    window = min(tokens, config.sliding_window) * row
    c4 = config.count("c4a") * (tokens // C4) * (row + key)
    c128 = config.count("c128a") * (tokens // C128) * row
    return config.num_hidden_layers * window + c4 + c128


def report(config: ModelConfig) -> list[tuple[str, str]]:
    """Label and value of every line `weft info` prints."""
    tensors, size = checkpoint_size(config)
    count = parameters(config)
    counts = [(config.count(kind), kind) for kind in KIND_OF_RATIO.values()]
    layers = ", ".join(f"{number} {kind}" for number, kind in counts if number)
    rows = [
        ("parameters", f"{_count(count.total)} ({_count(count.active)} active per token)"),
        _speculation(config, count.mtp),
        ("layers", f"{config.num_hidden_layers}: {layers}"),
        ("checkpoint tensors", f"{tensors:,}"),
        ("checkpoint bytes", _bytes(size)),
    ]
    tokens = config.max_position_embeddings
    for label, kv, index in _KV_REPORT:
        value = f"{_bytes(kv_bytes(config, tokens, kv, index))} for {tokens:,} tokens"
        rows.append((f"KV cache, {label}", value))
    return rows


def _speculation(config: ModelConfig, mtp: int) -> tuple[str, str]:
    if config.dspark_block_size is not None:
        return "DSpark draft stages", "not used: no speculation"
    return "MTP parameters", _count(mtp)


_KV_REPORT: tuple[tuple[str, KvFormat, IndexFormat], ...] = (
    ("bf16", "bf16", "bf16"),
    ("fp8", "fp8", "fp8"),
    ("fp8, fp4 indexer", "fp8", "fp4"),
)


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:,}"


def _bytes(size: int) -> str:
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):,.2f} {name}"
    return f"{size} B"
