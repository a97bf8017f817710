"""Optional libraries: why they are absent, and that the functions which they are asked for are still theirs."""

import inspect
from importlib import metadata
from importlib.metadata import version
from types import ModuleType

import pytest
import torch

from weft.kernels.libraries import deep_gemm, flash_mla, flashinfer

PACKAGES = {flash_mla: "sgl-flash-mla", deep_gemm: "sgl-deep-gemm", flashinfer: "flashinfer-python"}


@pytest.mark.parametrize("library", PACKAGES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_an_absence_is_explained(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise library.PackageNotFoundError(name)

    monkeypatch.setattr(library, "version", none)
    assert str(library.absence()).startswith(f"{PACKAGES[library]} is not installed")
    monkeypatch.setattr(library, "version", lambda name: "0.0.1")
    assert "0.0.1" in str(library.absence())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("library", PACKAGES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_without_a_gpu_none_is_used(library: ModuleType) -> None:
    assert library.absence() is not None


@pytest.mark.skipif(
    not any(metadata.Distribution.discover(name="flashinfer-python")), reason="flashinfer-python is not installed"
)
def test_flashinfer_has_the_parameters_that_are_used() -> None:
    from flashinfer import topk
    from flashinfer.mla import trtllm_batch_decode_sparse_mla_dsv4

    assert version("flashinfer-python")
    attention = inspect.signature(trtllm_batch_decode_sparse_mla_dsv4).parameters
    assert {"sparse_indices", "swa_topk_lens", "bmm1_scale", "sinks", "backend"} <= set(attention)
    chosen = inspect.signature(topk.top_k_page_table_transform).parameters
    assert {"row_to_batch", "deterministic", "tie_break", "page_size", "out_raw_indices"} <= set(chosen)
