# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Keys of the lightning indexer, copied from their pages into one buffer."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.gpu.aot import AotCase
from weft.kernels.gpu.base import Paged
from weft.kernels.gpu.indexer import GatheredKeys
from weft.kernels.layouts import RowLayout, keys_fp8
from weft.kernels.triton.index_tiles import key_places


@triton.jit(do_not_specialize=("P",))
def gather_kernel(
    out_codes, out_scales, pool, tables, P, counts, starts,
    PAGE: tl.constexpr, DATA_PAGE: tl.constexpr, SCALE_PAGE: tl.constexpr, SCALES_AT: tl.constexpr,
    DATA: tl.constexpr, BD: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BK keys of one sequence. All pointers to bytes."""
    sequence = tl.program_id(1)
    count = tl.load(counts + sequence)
    entry = tl.program_id(0) * BK + tl.arange(0, BK)
    seen = entry < count
    at, scale_at = key_places(
        tables, P, sequence, entry, seen, True, PAGE, DATA_PAGE, SCALE_PAGE, SCALES_AT, DATA, SCALE
    )
    row = tl.load(starts + sequence).to(tl.int64) + entry
    channel = tl.arange(0, BD)
    mask = seen[:, None] & (channel < DATA)[None, :]
    tile = tl.load(pool + at[:, None] + channel[None, :], mask=mask, other=0)
    tl.store(out_codes + row[:, None] * DATA + channel[None, :], tile, mask=mask)
    group = tl.arange(0, SCALE)
    scale = tl.load(pool + scale_at[:, None] + group[None, :], mask=seen[:, None], other=0)
    tl.store(out_scales + row[:, None] * SCALE + group[None, :], scale, mask=seen[:, None])


def _config(layout: RowLayout) -> dict[str, Any]:
    return {
        "PAGE": layout.page,
        "DATA_PAGE": layout.page_bytes,
        "SCALE_PAGE": layout.page_bytes,
        "SCALES_AT": layout.scales_at,
        "DATA": layout.data_bytes,
        "BD": triton.next_power_of_2(layout.data_bytes),
        "SCALE": layout.scale_bytes,
        "BK": 64,
    }


def gather(keys: Paged, tables: Tensor, counts: Tensor, starts: Tensor, out: GatheredKeys) -> None:
    """`gather_keys`."""
    config = _config(keys.layout)
    sequences, pages = tables.shape
    grid = (triton.cdiv(pages * keys.layout.page, config["BK"]), sequences)
    codes, scales = out.codes.view(torch.uint8), out.scales.view(torch.uint8)
    gather_kernel[grid](codes, scales, keys.bytes, tables, pages, counts, starts, **config, num_warps=4)


def aot() -> tuple[AotCase, ...]:
    """V4-Flash's sizes."""
    signature = {"out_codes": "*u8", "out_scales": "*u8", "pool": "*u8", "tables": "*i32", "P": "i32"}
    signature |= {"counts": "*i32", "starts": "*i32"}
    config = _config(keys_fp8(64, 128))
    return (AotCase("gather_keys fp8", gather_kernel, signature | dict.fromkeys(config, "constexpr"), config),)
