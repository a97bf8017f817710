"""FlashMLA's sparse decode for V4's rows, on Hopper: the package `sgl-flash-mla`, version 1.

The kernels that read 584-byte rows are in its legacy half. It splits a query's rows by the batch, so a row's bits
depend on the batch: it is never chosen, only named, as benchmarks do.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import is_v4


def absence() -> str | None:
    """Why it cannot be used here; None if it can."""
    try:
        found = version("sgl-flash-mla")
    except PackageNotFoundError:
        return "sgl-flash-mla is not installed"
    if not found.startswith("1."):
        return f"sgl-flash-mla {found} is not version 1"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "its kernels for 584-byte rows that are used here are Hopper's"
    return None


def metadata() -> Any:
    """What the library computes in a first call and uses again while shapes and lengths stay the same."""
    import flash_mla

    return flash_mla.get_mla_metadata()[0]


def sparse_attention(
    q: Tensor, pool: Paged, index: Tensor, lengths: Tensor, sink: Tensor, scale: float, plan: Any = None
) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, for 64 or 128 heads of 512 channels: [T, H, 512] bfloat16.

    plan: from `metadata()`, kept by the caller for calls of the same lengths.
    """
    reason = absence()
    assert reason is None, reason
    import flash_mla

    layout = pool.layout
    assert is_v4(layout), layout
    shape = len(pool.bytes), layout.page, 1, layout.row_bytes
    cache = pool.bytes.as_strided(shape, (layout.page_bytes, layout.row_bytes, layout.row_bytes, 1))
    out: Tensor = flash_mla.flash_mla_with_kvcache(
        q[:, None].to(torch.bfloat16),
        cache,
        None,
        None,
        512,
        plan or metadata(),
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=index[:, None],
        attn_sink=sink,
        topk_length=lengths,
        use_legacy=True,
    )[0]
    return out[:, 0]
