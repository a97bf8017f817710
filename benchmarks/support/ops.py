"""The attention side's ops at DeepSeek-V4-Flash's sizes: one list for counting bytes, predicting and timing.

Attention rotates its output back, which FlashMLA's bare calls beside it do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch

from weft.kernels.gpu import attention, compress, copies, heads, indexer, output, topk
from weft.kernels.libraries import deep_gemm, flash_mla
from weft.kernels.reference import attention as attention_inputs
from weft.kernels.reference import compress as compress_inputs
from weft.kernels.reference import copies as copies_inputs
from weft.kernels.reference import heads as heads_inputs
from weft.kernels.reference import indexer as indexer_inputs
from weft.kernels.reference import output as output_inputs
from weft.kernels.reference import topk as topk_inputs

WINDOW, TOP_K, HEADS, DIM, ROPE, INDEX_HEADS, INDEX_DIM = 128, 512, 64, 512, 64, 64, 128
# Where decode stands in its sequence: a completed group in four tokens, as on average.
_POSITION = 8191


@dataclass(frozen=True)
class Prepared:
    """One call on inputs of its own. run: of an implementation, None being the one that is chosen. least: bytes
    that it has to move. flop: of matrix products. peers: a library's bare call on the same inputs, its types
    converted and its plan made beforehand."""

    run: Callable[[str | None], object]
    least: int
    flop: float = 0.0
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """make(tokens, device): `tokens` rows, of as many sequences at decode and of one at prefill. layers: which
    kinds of layer run it once a step (w: window, 4: c4a, 8: c128a)."""

    name: str
    make: Callable[[int, str], Prepared]
    phase: str
    layers: str


def _if_usable(library: ModuleType, make: Callable[[], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    name = library.__name__.rsplit(".", 1)[1]
    return {} if library.absence() else {name: make()}


def _attention(tokens: int, device: str, columns: int) -> Prepared:
    pages = 8192 if device == "cuda" else 24
    e = attention_inputs.example(tokens, columns, device=device, pages=pages)
    arguments = (e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    turn = heads_inputs.angles(torch.randint(0, 100_000, (tokens,), device=device), ROPE)
    return Prepared(
        lambda name: attention.sparse_attention(
            *arguments, dtype=torch.bfloat16, rotate_back=turn, implementation=name
        ),
        attention.least_bytes(tokens, columns, HEADS, e.pool, rope=ROPE),
        4.0 * tokens * columns * HEADS * DIM,
        _if_usable(
            flash_mla,
            lambda: partial(flash_mla.sparse_attention, e.q.bfloat16(), *arguments[1:], flash_mla.metadata()),
        ),
    )


def _heads(tokens: int, device: str) -> Prepared:
    a = heads_inputs.example(tokens, device)
    return Prepared(
        lambda name: heads.norm_rope_store(**a, implementation=name),
        heads.least_bytes(tokens, HEADS, DIM, ROPE, 2, a["pool"]),
    )


def _spans(tokens: int, decode: bool) -> list[tuple[int, int]]:
    return [(_POSITION + i, 1) for i in range(tokens)] if decode else [(0, tokens)]


def _c4(tokens: int, device: str, decode: bool) -> Prepared:
    a = compress_inputs.example_c4(_spans(tokens, decode), device)
    width = a["rows"].shape[1]
    return Prepared(
        lambda name: compress.compress_c4(**a, implementation=name),
        compress.least_bytes_c4(a["plan"], width, ROPE, a["pool"], a["keys"]),
    )


def _c128(tokens: int, device: str, decode: bool) -> Prepared:
    a = compress_inputs.example_c128(_spans(tokens, decode), device)
    return Prepared(
        lambda name: compress.compress_c128(**a, implementation=name),
        compress.least_bytes_c128(a["plan"], DIM, ROPE, a["pool"]),
    )


def _query(tokens: int, device: str) -> Prepared:
    e = indexer_inputs.example(tokens, 64, device=device)
    return Prepared(
        lambda name: indexer.index_query(
            e.q, e.weights, e.cos_sin, codes="e4m3", hadamard=True, implementation=name
        ),
        indexer.least_query_bytes(e.q, ROPE, "e4m3"),
    )


def _logits(tokens: int, device: str, entries: int) -> Prepared:
    e = indexer_inputs.example(tokens, entries, device=device)
    query = indexer.index_query(e.q, e.weights, e.cos_sin, codes="e4m3", hadamard=True)
    return Prepared(
        lambda name: indexer.index_logits(
            query, e.keys, e.tables, e.sequence, e.visible, e.width, implementation=name
        ),
        indexer.least_bytes(query, e.keys.layout, tokens * entries, e.width),
        2.0 * tokens * entries * INDEX_HEADS * INDEX_DIM,
        _if_usable(
            deep_gemm,
            lambda: partial(
                deep_gemm.paged_logits,
                query,
                e.keys,
                e.tables[e.sequence.long()],
                e.visible,
                e.width,
                deep_gemm.plan(e.visible),
            ),
        ),
    )


def _ragged(tokens: int, device: str) -> Prepared:
    """A prompt's own keys, one per 4 of its tokens."""
    entries = max(64, tokens // 4)
    e = indexer_inputs.example(1, entries, rows=tokens, device=device)
    query = indexer.index_query(e.q, e.weights, e.cos_sin, codes="e4m3", hadamard=True)
    counts = torch.tensor([entries], dtype=torch.int32, device=device)
    start = torch.zeros(tokens, dtype=torch.int32, device=device)
    keys = indexer.gather_keys(e.keys, e.tables, counts, start[:1], entries)
    return Prepared(
        lambda name: indexer.index_logits_ragged(
            query, keys.codes, keys.scales, start, e.visible, e.width, implementation=name
        ),
        indexer.least_bytes(query, e.keys.layout, entries, e.width),
        2.0 * float(e.visible.sum()) * INDEX_HEADS * INDEX_DIM,
        _if_usable(
            deep_gemm,
            lambda: partial(deep_gemm.ragged_logits, query, keys, start, start + e.visible, e.width),
        ),
    )


def _top_k(tokens: int, device: str, entries: int) -> Prepared:
    e = topk_inputs.example(tokens, entries, device=device)
    return Prepared(
        lambda name: topk.top_k_rows(
            e.logits, e.visible, e.k, e.tables, e.sequence, e.page, e.base, e.out, e.column, implementation=name
        ),
        topk.least_bytes(tokens, tokens * entries, e.k),
    )


def _output(tokens: int, device: str, quant: bool) -> Prepared:
    a = output_inputs.example(tokens, device)
    call = output.inverse_rope_quant if quant else output.inverse_rope
    return Prepared(
        lambda name: call(**a, implementation=name),
        output.least_bytes(tokens, HEADS, DIM, ROPE, 2, 128 if quant else None),
    )


def _pages(count: int, device: str) -> Prepared:
    a = copies_inputs.example(count, device)
    return Prepared(
        lambda name: copies.copy_pages(**a, implementation=name), copies.least_bytes(a["pools"], count)
    )


def _slots(count: int, device: str) -> Prepared:
    a = copies_inputs.example_slots(count, device)
    return Prepared(
        lambda name: copies.copy_slots(**a, implementation=name), copies.least_bytes(a["state"], count)
    )


CASES = (
    Case("sparse attention, 128 rows", lambda n, d: _attention(n, d, WINDOW), "decode", "w"),
    Case(
        "sparse attention, 128 + 512 rows",
        lambda n, d: _attention(n, d, WINDOW + TOP_K),
        "decode",
        "4",
    ),
    Case(
        "sparse attention, 128 + 64 rows (8k, c128a)",
        lambda n, d: _attention(n, d, WINDOW + 64),
        "decode",
        "8",
    ),
    Case("norm, RoPE, store", _heads, "both", "w48"),
    Case("c4 compression", lambda n, d: _c4(n, d, True), "decode", "4"),
    Case("c4 compression", lambda n, d: _c4(n, d, False), "prefill", "4"),
    Case("c128 compression", lambda n, d: _c128(n, d, True), "decode", "8"),
    Case("c128 compression", lambda n, d: _c128(n, d, False), "prefill", "8"),
    Case("index query", _query, "both", "4"),
    Case("index logits, 2,048 keys (8k)", lambda n, d: _logits(n, d, 2048), "decode", "4"),
    Case("index logits, ragged", _ragged, "prefill", ""),
    Case("top 512 of 2,048 (8k)", lambda n, d: _top_k(n, d, 2048), "decode", "4"),
    Case("inverse RoPE", lambda n, d: _output(n, d, False), "both", ""),
    Case("inverse RoPE, quantised", lambda n, d: _output(n, d, True), "both", ""),
    Case("page copy, 21 layers", _pages, "rare", ""),
    Case("raw state copy", _slots, "rare", ""),
)
# Long contexts: these alone grow with it.
LONG = (
    Case("index logits, 32,768 keys (128k)", lambda n, d: _logits(n, d, 32768), "decode", "4"),
    Case("top 512 of 32,768 (128k)", lambda n, d: _top_k(n, d, 32768), "decode", "4"),
    Case(
        "sparse attention, 128 + 1,024 rows (128k, c128a)",
        lambda n, d: _attention(n, d, WINDOW + 1024),
        "decode",
        "8",
    ),
)
