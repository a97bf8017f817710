"""FlashInfer: whether it can be used here, its sparse attention for sm_120, and its top-k with page translation.

Sampling, hash routing and hyper-connections are in the `flashinfer_*` modules beside this one. Each of its modules
of CUDA code is either prebuilt, in the package or in `flashinfer-jit-cache`, or compiled by nvcc at its first use;
`absence` says which of this there is, and `usable` is what choices are made from.

Its attention for Hopper does not know V4, and the one for sm_100 wants rows in one uniform FP8 format, which
Weft's pools are not; so on those it is no alternative. It plans by the batch, so it is never chosen, only
named. Source: signatures, docstrings and kernels of flashinfer-python 0.7.2.post1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged
from weft.kernels.layouts import is_v4

# Its modules of CUDA code that are used here, and the function of its own that describes the build of each.
MODULES = {
    "sampling": ("flashinfer.jit.sampling", "gen_sampling_module"),
    "hash_topk": ("flashinfer.jit.hash_topk", "gen_hash_topk_module"),
    "mhc": ("flashinfer.jit.mhc", "gen_mhc_module"),
    "topk": ("flashinfer.jit.topk", "gen_topk_module"),
}
_PACKAGE = "flashinfer-python"
_LEAST = (0, 7)
_WORKSPACE = 128 << 20


def absence(module: str | None = None) -> str | None:
    """Why it cannot be used here; None if it can. module: one of MODULES, which is then looked for as well."""
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        return f"{_PACKAGE} is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST:
        return f"{_PACKAGE} {found} is older than {'.'.join(map(str, _LEAST))}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"its kernels are for sm_80 and later, and this GPU is sm_{major}{minor}"
    return _import_failure() or (None if module is None else _build_failure(module))


def usable() -> frozenset[str]:
    """For choices: "flashinfer.sampling" and so on, of the modules that can be used here."""
    if absence() is not None:
        return frozenset()
    return frozenset(f"flashinfer.{module}" for module in MODULES if absence(module) is None)


def require(module: str) -> None:
    """Callers name this library only where it is; the message says what is missing."""
    reason = absence(module)
    assert reason is None, reason


@cache
def _import_failure() -> str | None:
    """Importing it takes seconds, and needs packages that are easily left out."""
    try:
        import_module("flashinfer")
    except ImportError as error:
        return f"{_PACKAGE} cannot be imported: {error}"
    return None


@cache
def _build_failure(module: str) -> str | None:
    """Why there is neither a prebuilt object of a module nor a way to build one."""
    source, function = MODULES[module]
    describe: Callable[[], Any] = getattr(import_module(source), function)
    try:
        prebuilt = describe().is_aot
    except RuntimeError as error:  # what it says of a toolkit that is too old for the GPU
        return f"{_PACKAGE} refuses to build {module}: {error}"
    if prebuilt:
        return None
    missing = [tool for tool in ("ninja", "c++") if which(tool) is None]
    if not _has_nvcc():
        missing.insert(0, "nvcc")
    if missing:
        return f"{_PACKAGE} has no prebuilt {module} here, and to build it there is no {' and no '.join(missing)}"
    return None


def _has_nvcc() -> bool:
    """Where the library itself looks for it."""
    toolkit = import_module("flashinfer.jit.cpp_ext")
    try:
        home: str = toolkit.get_cuda_path()
    except RuntimeError:  # there is none
        return False
    return (Path(home) / "bin" / "nvcc").exists()


def attention_absence() -> str | None:
    """The same for its sparse attention, which is compiled for a GPU at its first call."""
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
    require("topk")
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
