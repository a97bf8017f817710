"""DeepGEMM behind the indexer's wrappers: what it is handed, held against a stand-in, and why it is absent."""

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from weft.kernels.gpu.base import Pages, installed
from weft.kernels.gpu.indexer import gather_keys, index_logits, index_logits_ragged, index_query
from weft.kernels.layouts import keys_fp8
from weft.kernels.libraries import deep_gemm
from weft.kernels.reference import indexer as reference


def make(device="cpu", heads=64):
    data = reference.example(3, 150, rows=2, heads=heads, device=device)
    query = index_query(data.q, data.weights, data.cos_sin, codes="e4m3", hadamard=True)
    return data, query


class StandIn:
    """Functions of the names and arguments of sgl-deep-gemm 0.1.5, which garble what they do not define."""

    def get_num_sms(self):
        return 132

    def get_paged_mqa_logits_metadata(self, context_lens, block_kv, num_sms):
        assert context_lens.dim() == 2 and context_lens.is_contiguous() and context_lens.dtype == torch.int32
        assert block_kv == 64
        return torch.zeros(num_sms + 1, 2, dtype=torch.int32)

    def fp8_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits
    ):
        tokens, next_n, _, dim = q.shape
        assert next_n == 1 and kv_cache.shape[1:] == (64, 1, dim + 4) and kv_cache.dtype == torch.uint8
        assert context_lens.shape == (tokens, 1) and block_table.shape[0] == tokens
        assert block_table.dtype == torch.int32 and schedule_meta.shape == (133, 2) and not clean_logits
        out = torch.full((tokens, -(-max_context_len // 256) * 256), float("nan"))
        query = SimpleNamespace(codes=q[:, 0], scales=None, weights=weights)
        keys = Pages(kv_cache.reshape(len(kv_cache), -1), keys_fp8(64, dim))
        each = torch.arange(tokens)
        reference.paged(query, keys, block_table, each, context_lens[:, 0], out)
        return torch.where(out == float("-inf"), float("nan"), out)[:, :max_context_len]

    def fp8_mqa_logits(self, q, kv, weights, ks, ke, clean_logits, max_seqlen_k):
        assert ks.dtype == ke.dtype == torch.int32 and not clean_logits and kv[1].dtype == torch.float32
        out = torch.empty(len(q), max_seqlen_k)
        query = SimpleNamespace(codes=q, scales=None, weights=weights)
        reference.ragged(query, SimpleNamespace(codes=kv[0], scales=kv[1]), ks, ke - ks, out)
        return torch.where(out == float("-inf"), float("nan"), out)


@pytest.fixture
def stand_in(monkeypatch):
    installed()  # looks for modules once, so before this one is here
    monkeypatch.setattr(deep_gemm, "absence", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setitem(sys.modules, "deep_gemm", StandIn())


def ragged(data, query, name):
    starts = torch.tensor([0, 150, 300], dtype=torch.int32, device=data.q.device)
    counts = torch.full_like(starts, 150)
    keys = gather_keys(data.keys, data.tables, counts, starts, 450)
    first = starts[data.sequence.long()]
    return index_logits_ragged(
        query, keys.codes, keys.scales, first, data.visible, data.width, implementation=name
    )


def paged(data, query, name):
    return index_logits(
        query, data.keys, data.tables, data.sequence, data.visible, data.width, implementation=name
    )


def test_what_the_library_is_handed(stand_in):
    data, query = make()
    data.visible[1] = 0
    assert torch.equal(paged(data, query, "deep_gemm"), paged(data, query, "reference"))
    assert torch.equal(ragged(data, query, "deep_gemm"), ragged(data, query, "reference"))


def test_what_it_cannot_score_is_refused(stand_in):
    data, query = make(heads=16)
    with pytest.raises(AssertionError, match="16"):
        paged(data, query, "deep_gemm")


def test_absence_is_explained(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(deep_gemm, "version", missing)
    assert "is not installed" in deep_gemm.absence()
    data, query = make()
    with pytest.raises(AssertionError, match=r"sgl-deep-gemm is not installed; version 0\.1\.5"):
        paged(data, query, "deep_gemm")
    monkeypatch.setattr(deep_gemm, "version", lambda _: "0.2.5")
    assert deep_gemm.absence() == "sgl-deep-gemm 0.2.5 is not 0.1.5, the version that is known to fit"
    monkeypatch.setattr(deep_gemm, "version", lambda _: "0.1.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert deep_gemm.absence() == "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "Hopper" in deep_gemm.absence()


@pytest.mark.gpu
def test_against_float64(device):
    """fp8 products are summed with 13 bits behind the point of the largest: 2^-8 of a row's largest score covers
    what 128 channels and 64 heads lose on random data."""
    reason = deep_gemm.absence()
    if reason is not None:
        pytest.skip(reason)
    data, query = make(device)
    want = paged(data, query, "reference")
    largest = want.abs().nan_to_num(posinf=0).max()
    for got in (paged(data, query, "deep_gemm"), ragged(data, query, "deep_gemm")):
        assert torch.equal(got.isinf(), want.isinf())
        assert ((got - want).nan_to_num().abs() <= 2.0**-8 * largest).all()
