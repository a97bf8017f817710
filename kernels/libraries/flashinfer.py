"""FlashInfer, where it has an op: sparse attention over 584-byte rows on sm_120, top-k with page translation.

Its attention for Hopper does not know V4, and the one for sm_100 wants rows in one uniform FP8 format, which
Weft's pools are not; so on those it is no alternative. It plans by the batch, so it is never chosen, only
named. Not run: none of our machines had it beside a GPU. Source: signatures and docstrings of flashinfer-python
0.7.2.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import is_v4

_WORKSPACE = 128 << 20


def absence() -> str | None:
    """Why it cannot be used here; None if it can."""
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return "flashinfer-python is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < (0, 7):
        return f"flashinfer-python {found} is older than 0.7"
    return None if torch.cuda.is_available() else "there is no GPU"


def attention_absence() -> str | None:
    """The same for its sparse attention."""
    reason = absence()
    if reason is None and torch.cuda.get_device_capability()[0] != 12:
        reason = "its attention over 584-byte rows is for sm_120"
    return reason


def sparse_attention(q: Tensor, pool: Paged, index: Tensor, lengths: Tensor, sink: Tensor, scale: float) -> Tensor:
    """As `weft.kernels.gpu.attention.sparse_attention`, for 512 channels: [T, H, 512] bfloat16."""
    reason = attention_absence()
    assert reason is None, reason
    from flashinfer.mla import trtllm_batch_decode_sparse_mla_dsv4

    layout = pool.layout
    assert is_v4(layout), layout
    shape = len(pool.bytes), 1, layout.page, layout.row_bytes
    strides = layout.page_bytes, layout.page_bytes, layout.row_bytes, 1
    out: Tensor = trtllm_batch_decode_sparse_mla_dsv4(
        q[:, None].to(torch.bfloat16),
        pool.bytes.as_strided(shape, strides),
        torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device),
        sparse_indices=index,
        swa_topk_lens=lengths,
        bmm1_scale=scale,
        sinks=sink,
        backend="sparse",
    )
    return out.view(q.shape)


def top_k_rows(
    logits: Tensor,
    visible: Tensor,
    k: int,
    tables: Tensor,
    sequence: Tensor,
    page: int,
    base: int,
    out: Tensor,
    column: int,
) -> None:
    """As `weft.kernels.gpu.topk.top_k_rows`. Its choice is in no order; it is sorted here."""
    reason = absence()
    assert reason is None, reason
    from flashinfer import topk

    entries = torch.empty(len(logits), k, dtype=torch.int32, device=logits.device)
    topk.top_k_page_table_transform(
        logits,
        tables,
        visible,
        k,
        row_to_batch=sequence,
        deterministic=True,
        tie_break=int(topk.TopKTieBreak.SMALL),
        page_size=page,
        out_raw_indices=entries,
    )
    last = torch.iinfo(torch.int32).max
    entries = entries.masked_fill(entries < 0, last).sort(1).values
    none = entries == last
    entries = entries.masked_fill(none, 0)
    pages = tables[sequence.long()[:, None], (entries // page).long()]
    rows = (base + pages * page + entries % page).masked_fill(none, -1)
    out[:, column : column + k] = rows
