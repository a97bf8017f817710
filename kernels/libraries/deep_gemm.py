"""DeepGEMM's scores of fp8 indexer keys, and its FP8 product, on Hopper and Blackwell: the package
`sgl-deep-gemm`, version 0.1.5.

It reads the pages that `layouts.keys_fp8(64, 128)` describes as they are. Later versions need a later torch than
2.11. Kernels are compiled by nvcc at their first call; DG_JIT_CACHE_DIR says where they
are kept. Columns behind a row's last key are left undefined by it, so each call ends with a pass that fills them.
It is never chosen, only named, as benchmarks do. Source: the package's own signatures and checks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged
from weft.kernels.gpu.indexer import GatheredKeys, IndexQuery
from weft.kernels.gpu.linear import quantise_rows
from weft.kernels.gpu.weights import GROUP, Fp8Weight
from weft.kernels.layouts import keys_fp8

VERSION = "0.1.5"
_HEADS = {9: (32, 64), 10: (8, 16, 32, 64)}


def absence() -> str | None:
    """Why it cannot be used here; None if it can."""
    try:
        found = version("sgl-deep-gemm")
    except PackageNotFoundError:
        return f"sgl-deep-gemm is not installed; version {VERSION} is the one that is known to fit"
    if found != VERSION:
        return f"sgl-deep-gemm {found} is not {VERSION}, the version that is known to fit"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] not in _HEADS:
        return "its kernels that are used here are Hopper's and Blackwell's"
    return None


def _check(query: IndexQuery) -> Any:
    """The library, if it can score this query."""
    reason = absence()
    assert reason is None, reason
    heads = query.weights.shape[1]
    able = _HEADS[torch.cuda.get_device_capability()[0]]
    assert query.kind == "e4m3" and query.dim == 128 and heads in able, (query.kind, query.dim, heads)
    return import_module("deep_gemm")


def plan(visible: Tensor) -> Tensor:
    """Which multiprocessor reads what: [T] int32 -> [multiprocessors + 1, 2] int32, the same for all layers."""
    library = import_module("deep_gemm")
    schedule: Tensor = library.get_paged_mqa_logits_metadata(visible[:, None], 64, library.get_num_sms())
    return schedule


def paged(query: IndexQuery, keys: Paged, tables: Tensor, sequence: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits`, each token being a sequence of its own to the library."""
    _check(query)
    logits = paged_logits(query, keys, tables[sequence.long()], visible, out.shape[1], plan(visible))
    _fill(out, logits, visible)


def paged_logits(
    query: IndexQuery, keys: Paged, tables: Tensor, visible: Tensor, width: int, schedule: Tensor
) -> Tensor:
    """The library's call alone. tables: [T, P] of each token; schedule: from `plan`. Columns that are not visible
    are undefined."""
    library = _check(query)
    layout = keys.layout
    assert layout == keys_fp8(64, 128), layout
    cache = keys.bytes.view(len(keys.bytes), layout.page, 1, layout.row_bytes)
    logits: Tensor = library.fp8_paged_mqa_logits(
        query.codes[:, None], cache, query.weights, visible[:, None], tables, schedule, width, False
    )
    return logits


def ragged(query: IndexQuery, keys: GatheredKeys, start: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits_ragged`: with a longest row given, columns count from a row's first key."""
    _fill(out, ragged_logits(query, keys, start, start + visible, out.shape[1]), visible)


def ragged_logits(query: IndexQuery, keys: GatheredKeys, start: Tensor, end: Tensor, width: int) -> Tensor:
    """The library's call alone."""
    library = _check(query)
    logits: Tensor = library.fp8_mqa_logits(
        query.codes, (keys.codes, keys.scales), query.weights, start, end, False, width
    )
    return logits


def fp8_gemm(x: Tensor, weight: Fp8Weight) -> Callable[[], Tensor]:
    """Its dense product of x [T, K], quantised beforehand, with FP8 weights: the bare call, for timing. Its scales
    are of 128 x 128 weights: of each such block it is given those of the first row."""
    reason = absence()
    assert reason is None, reason
    library = import_module("deep_gemm")
    codes, scales = quantise_rows(x)
    rows = (scales.int() << 23).view(torch.float32)
    rows = library.transform_sf_into_required_layout(rows, len(x), x.shape[1], (1, 128, 128), is_sfa=True)
    blocks = (weight.scales[:, ::GROUP].T.contiguous().int() << 23).view(torch.float32)
    out = torch.empty(len(x), weight.shape[0], dtype=torch.bfloat16, device=x.device)

    def run() -> Tensor:
        library.fp8_gemm_nt((codes, rows), (weight.codes, blocks), out)
        return out

    return run


def _fill(out: Tensor, logits: Tensor, visible: Tensor) -> None:
    column = torch.arange(out.shape[1], device=out.device)
    nothing = torch.full((), float("-inf"), device=out.device)
    torch.where(column < visible[:, None], logits[:, : out.shape[1]], nothing, out=out)
