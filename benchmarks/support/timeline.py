"""The predicted timeline of one decode step of DeepSeek-V4-Flash: what each op moves, multiplies and launches.

An op's time is a launch for each of its kernels plus the larger of its bytes over the card's bandwidth and its
products over the card's rate: nothing overlaps, nothing waits. Bytes are the least possible times a ratio that
Triton's interpreter counted (`timeline_counts`); those of Hopper's and Blackwell's own attention come from their
loops. One card is taken to hold everything: a model of several cards has their bandwidth, less what they exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from support.timeline_counts import Count
from weft.kernels.gpu import experts, heads, hyper, indexer, linear, routing, sampling, topk
from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.expert_weights import Experts, Fp8Experts
from weft.kernels.gpu.weights import FloatWeight, Fp8Weight
from weft.kernels.layouts import keys_fp8, kv_fp8
from weft.kernels.triton import attention_sm90, attention_sm100
from weft.kernels.triton.linear import FUSED_TOKENS
from weft.kernels.triton.topk import config as topk_config
from weft.runtime.config import C4, C128, LayerKind, ModelConfig

Rate = Literal["bf16", "fp8"]
meta = partial(torch.empty, device="meta")
BATCHES = (1, 32, 256)
CONTEXTS = {"8k": 8192, "128k": 131072}
KINDS: tuple[LayerKind, ...] = ("window", "c4a", "c128a")
PLACES = 7  # experts of a token: six routed ones and the shared one
MULTIPROCESSORS = 132  # of an H200
POOL = Pages.empty(1, kv_fp8(64, 448, 64))
KEYS = keys_fp8(64, 128)


@dataclass(frozen=True)
class Card:
    """Bytes a second copied; products a second. H200: measured on one. B200: 8 TB/s, and somewhat less than its
    datasheet's products."""

    bandwidth: float
    rates: Mapping[Rate, float]


CARDS = {
    "H200": Card(4.3e12, {"bf16": 790e12, "fp8": 1400e12}),
    "B200": Card(8.0e12, {"bf16": 2000e12, "fp8": 4000e12}),
}


@dataclass(frozen=True)
class Item:
    """A part of a layer or of the rest. group: its name in tables and plots."""

    group: str
    launches: int
    moved: float
    flop: float = 0.0
    rate: Rate = "bf16"

    def seconds(self, card: Card) -> float:
        """Without the launches."""
        return max(self.moved / card.bandwidth, self.flop / card.rates[self.rate])


@dataclass(frozen=True)
class Step:
    """What is predicted. counts: of each op, by `timeline_counts`."""

    config: ModelConfig
    card: str
    batch: int
    context: int
    experts: Experts
    counts: Mapping[str, Count]

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    def rows_of(self, kind: LayerKind) -> int:
        """Rows that a query of a layer attends to."""
        top = self.config.index_topk
        return (
            self.config.sliding_window
            + {"window": 0, "c4a": min(top, self.keys), "c128a": self.context // C128}[kind]
        )

    @property
    def keys(self) -> int:
        """Index keys that a query sees."""
        return self.context // C4

    @property
    def used(self) -> float:
        """Different routed experts that a layer is expected to need, if tokens choose at random."""
        return distinct(self.config.n_routed_experts, self.config.num_experts_per_tok, self.batch)


def distinct(experts: int, each: int, batch: int) -> float:
    """Of `batch` tokens that take `each` of so many experts, independently."""
    return experts * (1.0 - (1.0 - each / experts) ** batch)


def layer(kind: LayerKind, step: Step) -> list[Item]:
    """One layer, in order."""
    return [
        *_mix(step, 1),
        *_projections(kind, step),
        *_entries(kind, step),
        *_attend(kind, step),
        *_output(step),
        *_mix(step, PLACES),
        *_experts(step),
    ]


def _op(
    step: Step, group: str, name: str, least: float, flop: float = 0.0, rate: Rate = "bf16", more: int = 0
) -> Item:
    """An op as it was counted, at its least bytes here. more: launches that the count did not need."""
    count = step.counts[name]
    return Item(group, len(count.kernels) + more, least * count.ratio, flop, rate)


def _mix(step: Step, parts: int) -> Iterator[Item]:
    """The sublayer before is spread over the streams, the next one's input gathered and normalised."""
    yield _op(step, "hyper-connections", "hyper", hyper.least_bytes(step.batch, step.config.hidden_size, parts, 2))


def _fp8(step: Step, group: str, rows: int, columns: int, groups: int = 1) -> Item:
    """Of more tokens than are quantised on the way, a launch more, that writes and reads their codes."""
    codes, scales = (
        meta(rows, columns, dtype=torch.float8_e4m3fn),
        meta(-(-columns // 128), rows, dtype=torch.uint8),
    )
    least = linear.least_bytes(step.batch, Fp8Weight(codes, scales, scales), groups, 2, 2)
    apart = step.batch > FUSED_TOKENS
    least += apart * 2 * step.batch * groups * columns
    return _op(step, group, "fp8_linear", least, 2.0 * step.batch * rows * columns, "fp8", int(apart))


def _float(step: Step, group: str, rows: int, columns: int) -> Item:
    weight = meta(rows, columns, dtype=torch.bfloat16)
    least = linear.least_bytes(step.batch, FloatWeight(weight, weight), 1, 2, 4)
    return _op(step, group, "linear", least, 2.0 * step.batch * rows * columns)


def _projections(kind: LayerKind, step: Step) -> Iterator[Item]:
    c, group = step.config, "projections of q and KV"
    yield _fp8(step, group, c.q_lora_rank + c.head_dim, c.hidden_size)
    indexed = c.index_n_heads * c.index_head_dim if kind == "c4a" else 0
    yield _fp8(step, group, c.num_attention_heads * c.head_dim + indexed, c.q_lora_rank)
    least = heads.least_bytes(step.batch, step.heads, c.head_dim, c.qk_rope_head_dim, 2, POOL)
    yield _op(step, "norm, RoPE, store", "norm_rope_store", least)


def _entries(kind: LayerKind, step: Step) -> Iterator[Item]:
    """Compression and, in c4a layers, the choice of entries."""
    c, batch = step.config, step.batch
    if kind == "c128a":
        yield _float(step, "compression", 2 * c.head_dim, c.hidden_size)
        yield _op(step, "compression", "compress_c128", batch * step.counts["compress_c128"].of_a_token)
    if kind != "c4a":
        return
    width = 4 * (c.head_dim + c.index_head_dim)
    yield _float(step, "compression", width + c.index_n_heads, c.hidden_size)
    yield _op(step, "compression", "compress_c4", batch * step.counts["compress_c4"].of_a_token)
    q = meta(batch, c.index_n_heads, c.index_head_dim, dtype=torch.bfloat16)
    least = indexer.least_query_bytes(q, c.qk_rope_head_dim, "e4m3")
    yield _op(step, "indexer", "index_query", least)
    query = batch * c.index_n_heads * (c.index_head_dim + 4)
    least = query + batch * step.keys * (KEYS.row_bytes + 4)
    flop = 2.0 * batch * step.keys * c.index_n_heads * c.index_head_dim
    yield _op(step, "indexer", "index_logits", least, flop, "fp8")
    slabs = topk_config(step.keys, c.index_topk)[0]
    least = topk.least_bytes(batch, batch * step.keys, c.index_topk)
    # Entries of each slab: written, read, and their scores read again.
    again = 12 * batch * slabs * c.index_topk if slabs > 1 else 0
    yield _op(step, "indexer", "top_k_rows", least + again, more=int(slabs > 1))


def _attend(kind: LayerKind, step: Step) -> Iterator[Item]:
    """And the rotation back, with the merge."""
    c, columns = step.config, step.rows_of(kind)
    if step.card == "H200":
        splits = -(-columns // attention_sm90.SPLIT)
        items = step.batch * -(-step.heads // attention_sm90.HEADS) * splits
        chunk = attention_sm90.chunk_of(items, splits, MULTIPROCESSORS)
        moved = attention_sm90.moved([columns], step.heads, chunk, c.qk_rope_head_dim).total
    else:
        moved = attention_sm100.moved([columns], step.heads, rope=c.qk_rope_head_dim).total
    yield Item("attention", 2, moved * step.batch, 4.0 * step.batch * columns * step.heads * c.head_dim)


def _output(step: Step) -> Iterator[Item]:
    c = step.config
    wide, low = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    yield _fp8(step, "output projections", low, wide // c.o_groups, c.o_groups)
    yield _fp8(step, "output projections", c.hidden_size, low)


def _experts(step: Step) -> Iterator[Item]:
    c = step.config
    least = routing.least_bytes(step.batch, c.n_routed_experts, c.hidden_size, c.num_experts_per_tok, 2)
    yield _op(step, "routing", "route", least, 2.0 * step.batch * c.n_routed_experts * c.hidden_size)
    least = experts.least_bytes(step.batch, PLACES, step.used, step.experts, 2)
    flop = 6.0 * step.batch * PLACES * c.hidden_size * c.moe_intermediate_size
    kind = "fp8" if isinstance(step.experts, Fp8Experts) else "fp4"
    yield _op(step, "experts", f"experts {kind}", least, flop, "fp8")


def rest(step: Step) -> list[Item]:
    """What a step has once: lists and embeddings, the last layer's output spread and kept, the readout and head, a
    token of each row."""
    c, batch = step.config, step.batch
    streams = c.hc_mult * c.hidden_size
    lists = 4 * batch * (step.rows_of("c4a") + step.rows_of("c128a") + c.sliding_window + 2 * c.qk_rope_head_dim)
    gather = 4 * c.hc_mult * streams + 2 * batch * (streams + c.hidden_size)
    sampled = sampling.least_bytes(batch, c.vocab_size, warm=batch)  # at a temperature above 0
    return [
        Item("embedding, lists, state", 4, lists + 2 * batch * ((1 + PLACES) * c.hidden_size + 5 * streams)),
        _op(step, "head", "hyper_head", gather),
        _float(step, "head", c.vocab_size, c.hidden_size),
        _op(step, "sampling", "sample_rows", sampled),
    ]


def whole(step: Step) -> list[Item]:
    """All layers, and the rest."""
    per_kind = {kind: layer(kind, step) for kind in KINDS}
    return [item for kind in step.config.layer_kinds for item in per_kind[kind]] + rest(step)


def totals(items: list[Item], card: Card, launch: float) -> dict[str, float]:
    """Microseconds of each group, in order, and of all launches."""
    out: dict[str, float] = {}
    for item in items:
        out[item.group] = out.get(item.group, 0.0) + 1e6 * item.seconds(card)
    return out | {"launches": 1e6 * launch * sum(item.launches for item in items)}


def roofline(step: Step) -> float:
    """Bytes that a step cannot do without: every weight that some token needs, once; of each token's sequence the
    rows that it attends to in every layer, and all index keys. Activations, state and logits are left out."""
    c = step.config
    dim = c.hidden_size
    wide, low = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    fp8 = (c.q_lora_rank + c.head_dim) * dim + wide * c.q_lora_rank + low * (wide // c.o_groups) + dim * low
    mixers = 2 * 4 * c.hc_mix_size * c.hc_mult * dim
    common = fp8 * (1 + 1 / 128) + mixers + 2 * c.n_routed_experts * dim
    common += experts.least_bytes(0, PLACES, step.used, step.experts, 2)
    width = 4 * (c.head_dim + c.index_head_dim) + c.index_n_heads
    own = {
        "window": 0.0,
        "c4a": c.index_n_heads * c.index_head_dim * c.q_lora_rank * (1 + 1 / 128) + 2 * width * dim,
        "c128a": 2 * 2 * c.head_dim * dim,
    }
    total = 2.0 * c.vocab_size * dim
    for kind in c.layer_kinds:
        read = step.rows_of(kind) * POOL.layout.row_bytes + (kind == "c4a") * step.keys * KEYS.row_bytes
        total += common + own[kind] + step.batch * read
    return total
