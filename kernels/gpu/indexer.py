"""The lightning indexer on devices: queries in the keys' format, and the score of every visible key.

score[t, j] = sum over heads of weights[t, h] * relu(q[t, h] . k[j])   (DeepSeek-V4, c4 layers)

Keys are rows of a pool in `layouts.keys_fp8` (one float32 scale per key) or `layouts.keys_fp4` (a power of two per
32 channels). Scores come either straight from the pool's pages, or from keys gathered into one buffer, which is
what libraries want for prefill. Both give the same bits: a tile of keys meets one query at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import (
    Arch,
    Choice,
    Example,
    Op,
    Paged,
    arch,
    check,
    check_tensor,
    installed,
    portable,
)
from weft.kernels.layouts import Codes, RowLayout

FP4_GROUP = 32
_FLOATS = (torch.bfloat16, torch.float32)
# Each has the functions query, paged, ragged and gather, or those of them that it implements.
_MODULES = {
    "reference": "weft.kernels.reference.indexer",
    "triton": "weft.kernels.triton.indexer",
    "triton_sm100": "weft.kernels.triton.indexer_sm100",
    "deep_gemm": "weft.kernels.libraries.deep_gemm",
}


@dataclass(frozen=True)
class IndexQuery:
    """Quantised queries.

    codes: [T, n, dI] float8_e4m3fn, or [T, n, dI / 2] uint8 with the even channel in the low nibble.
    scales: None where a head has one scale (it is folded into weights), or [T, n, dI / 32] uint8, 2^(s - 127).
    weights: [T, n] float32.
    """

    codes: Tensor
    scales: Tensor | None
    weights: Tensor

    @property
    def kind(self) -> Codes:
        return "e4m3" if self.scales is None else "e2m1"

    @property
    def dim(self) -> int:
        return self.codes.shape[2] * (1 if self.scales is None else 2)

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.codes.nbytes + scales + self.weights.nbytes


@dataclass(frozen=True)
class GatheredKeys:
    """Keys of some sequences, contiguous.

    codes: [K, dI] float8_e4m3fn, or [K, dI / 2] uint8. scales: [K] float32, or [K, dI / 32] uint8.
    """

    codes: Tensor
    scales: Tensor


def groups_of(dim: int) -> int:
    """Scale groups of a query or key of `dim` e2m1 channels."""
    return dim // min(FP4_GROUP, dim)


def choose_query(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("index_query", arch, libraries)


def choose(kind: Codes, dim: int, arch: Arch, libraries: frozenset[str]) -> Choice:
    """What scores keys of a format and width."""
    if kind == "e2m1" and arch == "sm100" and "triton" in libraries and dim >= 64:
        return Choice(
            "index_logits", "triton_sm100", "tensor cores of this architecture scale fp4 blocks themselves"
        )
    return portable("index_logits", arch, libraries)


def index_query(
    q: Tensor,
    weights: Tensor,
    cos_sin: Tensor,
    *,
    codes: Codes,
    hadamard: bool,
    factor: float = 1.0,
    implementation: str | None = None,
) -> IndexQuery:
    """RoPE on the last channels, a normalised Hadamard rotation if asked for, and the keys' number format.

    q: [T, n, dI], weights: [T, n] of heads, both bfloat16 or float32, each possibly some columns of wider rows (of
    q, a row's heads are contiguous). factor: multiplies the weights, in float32; (dI * n)^-0.5, if they are not
    times that yet. cos_sin: [T, rope] float32: cosines of the rope / 2 interleaved pairs, then sines.
    e4m3: scale max(amax, 1e-4) / 448 per (token, head), folded into the weights returned. e2m1: 2^ceil(log2(amax /
    6)) per 32 channels. Source: DeepSeek-V4's published inference code, DeepGEMM's test data.
    """
    tokens, heads, dim = q.shape
    check_tensor("q", q, (tokens, heads, dim), *_FLOATS)
    check_tensor("weights", weights, (tokens, heads), *_FLOATS)
    check_tensor("cos_sin", cos_sin, (tokens, None), torch.float32)
    check(cos_sin.is_contiguous() and (heads == 1 or q.stride(1) == dim), "cos_sin, heads of q: contiguous")
    rope = cos_sin.shape[1]
    check(rope % 2 == 0 and rope <= dim, rope, dim)
    check(dim & (dim - 1) == 0, "a power of two, for the Hadamard rotation and the groups", dim)
    out = _empty_query(q, codes)
    if q.numel() == 0:
        return out
    name = implementation or choose_query(arch(q), installed()).implementation
    _module(name).query(q, weights, cos_sin, hadamard, factor, out)
    return out


def _module(name: str) -> Any:
    check(name in _MODULES, name)
    return import_module(_MODULES[name])


def _empty_query(q: Tensor, codes: Codes) -> IndexQuery:
    tokens, heads, dim = q.shape
    weights = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if codes == "e4m3":
        made = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
        return IndexQuery(made, None, weights)
    packed = torch.empty(tokens, heads, dim // 2, dtype=torch.uint8, device=q.device)
    scales = torch.empty(tokens, heads, groups_of(dim), dtype=torch.uint8, device=q.device)
    return IndexQuery(packed, scales, weights)


def index_logits(
    query: IndexQuery,
    keys: Paged,
    tables: Tensor,
    sequence: Tensor,
    visible: Tensor,
    width: int,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Scores of keys in their pages: [T, width] float32, -inf from column visible[t] on.

    tables: [S, P] int32, page numbers of each sequence's keys: key j of sequence s is row
    tables[s, j // page] * page + j % page. sequence: [T] int32, which of them a token belongs to. visible: [T]
    int32, at most width and P * page. Pages of keys that are not visible are not read.
    """
    tokens = _check_query(query, keys.layout.codes, keys.layout.coded)
    check_tensor("tables", tables, (None, None), torch.int32)
    check_tensor("sequence", sequence, (tokens,), torch.int32)
    check_tensor("visible", visible, (tokens,), torch.int32)
    check(keys.bytes.is_contiguous() and tables.is_contiguous(), "contiguous")
    out = torch.empty(tokens, width, dtype=torch.float32, device=visible.device)
    if out.numel() == 0:
        return out
    name = implementation or choose(query.kind, query.dim, arch(visible), installed()).implementation
    _module(name).paged(query, keys, tables, sequence, visible, out)
    return out


def index_logits_ragged(
    query: IndexQuery,
    codes: Tensor,
    scales: Tensor,
    start: Tensor,
    visible: Tensor,
    width: int,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Scores of gathered keys: [T, width] float32; column j of token t is key start[t] + j, -inf from visible[t].

    codes, scales: as in `GatheredKeys`. start, visible: [T] int32. Rows of the buffer that no token sees are not
    read. Neighbouring tokens of one sequence share what is read.
    """
    tokens = _check_query(query, query.kind, query.dim)
    rows = codes.shape[0]
    if query.scales is None:
        check_tensor("codes", codes, (rows, query.dim), torch.float8_e4m3fn)
        check_tensor("scales", scales, (rows,), torch.float32)
    else:
        check_tensor("codes", codes, (rows, query.dim // 2), torch.uint8)
        check_tensor("scales", scales, (rows, groups_of(query.dim)), torch.uint8)
    check_tensor("start", start, (tokens,), torch.int32)
    check_tensor("visible", visible, (tokens,), torch.int32)
    check(codes.is_contiguous() and scales.is_contiguous(), "contiguous")
    out = torch.empty(tokens, width, dtype=torch.float32, device=visible.device)
    if out.numel() == 0:
        return out
    name = implementation or choose(query.kind, query.dim, arch(visible), installed()).implementation
    _module(name).ragged(query, GatheredKeys(codes, scales), start, visible, out)
    return out


def _check_query(query: IndexQuery, kind: Codes, dim: int) -> int:
    tokens, heads, _ = query.codes.shape
    check(query.kind == kind and query.dim == dim, query.kind, kind, query.dim, dim)
    check_tensor("weights", query.weights, (tokens, heads), torch.float32)
    check(query.codes.is_contiguous() and query.weights.is_contiguous(), "contiguous")
    if query.scales is not None:
        check_tensor("scales", query.scales, (tokens, heads, groups_of(dim)), torch.uint8)
        check(query.scales.is_contiguous(), "contiguous")
    return tokens


def gather_keys(
    keys: Paged,
    tables: Tensor,
    counts: Tensor,
    starts: Tensor,
    total: int,
    *,
    implementation: str | None = None,
) -> GatheredKeys:
    """The first counts[s] keys of sequence s, at rows starts[s].. of a buffer of `total` rows.

    tables: [S, P] int32 page numbers; counts, starts: [S] int32, ranges without overlap. Rows outside all ranges
    are left as they are, which is undefined.
    """
    layout = keys.layout
    sequences = tables.shape[0]
    check_tensor("tables", tables, (None, None), torch.int32)
    check_tensor("counts", counts, (sequences,), torch.int32)
    check_tensor("starts", starts, (sequences,), torch.int32)
    check(keys.bytes.is_contiguous() and tables.is_contiguous(), "contiguous")
    out = _empty_keys(layout, total, counts.device)
    if total == 0 or tables.numel() == 0:
        return out
    name = implementation or portable("gather_keys", arch(counts), installed()).implementation
    _module(name).gather(keys, tables, counts, starts, out)
    return out


def _empty_keys(layout: RowLayout, total: int, device: torch.device) -> GatheredKeys:
    make = partial(torch.empty, device=device)
    if layout.codes == "e4m3":
        codes = make(total, layout.coded, dtype=torch.float8_e4m3fn)
        return GatheredKeys(codes, make(total, dtype=torch.float32))
    codes = make(total, layout.coded_bytes, dtype=torch.uint8)
    return GatheredKeys(codes, make(total, layout.groups, dtype=torch.uint8))


def least_query_bytes(q: Tensor, rope: int, codes: Codes) -> int:
    """Queries, weights and rotations read once, the quantised query written once."""
    tokens, heads, dim = q.shape
    written = dim + 4 if codes == "e4m3" else dim // 2 + groups_of(dim) + 4
    return q.nbytes + 4 * tokens * rope + tokens * heads * (4 + written)


def least_bytes(query: IndexQuery, layout: RowLayout, keys: int, width: int) -> int:
    """Of logits: the query and `keys` distinct keys read once, the rows written once."""
    return query.nbytes + keys * layout.row_bytes + 4 * query.codes.shape[0] * width


OP = Op(
    "indexer",
    "queries of the c4 indexer, and their scores for every visible key",
    ("reference", "triton", "triton_sm100", "deep_gemm"),
    (
        Example("any shape", choose_query),
        Example("V4-Flash, fp8 keys", partial(choose, "e4m3", 128)),
        Example("V4-Flash, fp4 keys", partial(choose, "e2m1", 128)),
    ),
)
