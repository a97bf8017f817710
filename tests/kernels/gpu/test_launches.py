"""What a decode step launches for each op of the attention side: one kernel, attention two, and no op of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.kernels import in_wider_rows
from weft.kernels.gpu.attention import sparse_attention
from weft.kernels.gpu.compress import compress_c4, compress_c128
from weft.kernels.gpu.heads import norm_rope_store
from weft.kernels.gpu.indexer import index_logits, index_query
from weft.kernels.gpu.interpreter import launches
from weft.kernels.gpu.output import inverse_rope_quant
from weft.kernels.gpu.topk import top_k_rows
from weft.kernels.reference import attention, compress, heads, indexer, output, topk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts launches")
TOKENS = 2


def attend(columns: int) -> Callable[[], object]:
    e = attention.example(TOKENS, columns, heads=4)
    turn = heads.angles(e.lengths, 64)
    rest = e.pool, e.index, e.lengths, e.sink, e.scale
    return lambda: sparse_attention(
        e.q, *rest, dtype=torch.bfloat16, split=64, rotate_back=turn, implementation="triton"
    )


def prepare_heads() -> Callable[[], object]:
    given = heads.example(TOKENS, "cpu", heads=4)
    q, kv = in_wider_rows(given["q"].flatten(1), 0, 64), in_wider_rows(given["kv"], 32, 0)
    given |= {"q": q.unflatten(1, (4, 512)), "kv": kv}
    return lambda: norm_rope_store(**given, dtype=torch.float16, implementation="triton")


def compress_rows(ratio: int) -> Callable[[], object]:
    spans = [(8191, 1), (130, 1)]
    given = compress.example_c4(spans, "cpu") if ratio == 4 else compress.example_c128(spans, "cpu")
    given["rows"] = in_wider_rows(given["rows"], 0, 64)
    call = compress_c4 if ratio == 4 else compress_c128
    return lambda: call(**given, implementation="triton")


def query_of_keys() -> Callable[[], object]:
    e = indexer.example(TOKENS, 70, heads=4)
    q = in_wider_rows(e.q.flatten(1), 0, 64).unflatten(1, (4, 128))
    weights = in_wider_rows(e.weights, 16, 0)
    return lambda: index_query(
        q, weights, e.cos_sin, codes="e4m3", hadamard=True, factor=0.125, implementation="triton"
    )


def score_keys() -> Callable[[], object]:
    e = indexer.example(TOKENS, 70, heads=4)
    query = index_query(e.q, e.weights, e.cos_sin, codes="e4m3", hadamard=True)
    rest = e.keys, e.tables, e.sequence, e.visible, e.width
    return lambda: index_logits(query, *rest, implementation="triton")


def choose_keys(entries: int) -> Callable[[], object]:
    e = topk.example(1, entries)
    rest = e.visible, e.k, e.tables, e.sequence, e.page, e.base, e.out, e.column
    return lambda: top_k_rows(e.logits, *rest, implementation="triton")


def quantise_output() -> Callable[[], object]:
    given = output.example(TOKENS, "cpu", heads=4)
    return lambda: inverse_rope_quant(**given, implementation="triton")


@pytest.mark.parametrize(
    ("prepare", "kernels"),
    [
        (lambda: attend(100), ["attend_swapped", "merge"]),
        (lambda: attend(30), ["attend_swapped", "merge"]),
        (prepare_heads, ["_norm_rope_store"]),
        (lambda: compress_rows(4), ["_compress_c4"]),
        (lambda: compress_rows(128), ["_compress_c128"]),
        (query_of_keys, ["query_kernel"]),
        (score_keys, ["logits_kernel"]),
        (lambda: choose_keys(2048), ["rows_kernel"]),
        (lambda: choose_keys(20000), ["slabs_kernel", "merge_kernel"]),
        (quantise_output, ["_inverse_rope_quant"]),
    ],
)
def test_launches(prepare: Callable[[], Callable[[], object]], kernels: list[str]) -> None:
    call = prepare()
    with launches() as seen:
        call()
    assert seen.names == kernels
