"""FlashInfer: why it is absent, when it is chosen, and what it is handed, held against a stand-in."""

import inspect
import math
import sys
from functools import partial
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from support.flashinfer import (
    SETTINGS,
    StandIn,
    check_routes,
    check_streams,
    expected,
    keys,
    mixer,
    routes,
    rows_of,
    settings,
)
from weft.kernels.gpu import hyper, routing, sampling
from weft.kernels.gpu.base import installed
from weft.kernels.gpu.weights import FloatWeight
from weft.kernels.libraries import flashinfer, flashinfer_hyper, flashinfer_routing, flashinfer_sampling
from weft.runtime.decoding import device_sampler
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import Draw

REMEMBERED = (flashinfer._import_failure, flashinfer._build_failure, installed)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing of what this machine has, and nothing remembered of what a test made of it."""
    for remembered in REMEMBERED:
        remembered.cache_clear()
    monkeypatch.setattr(flashinfer, "version", lambda _: "0.7.2.post1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    yield monkeypatch
    for remembered in REMEMBERED:
        remembered.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    installed()  # remembered before the library seems to be here
    monkeypatch.setattr(flashinfer, "absence", lambda module=None: None)
    library = StandIn()
    for name in ("flashinfer", "flashinfer.sampling", "flashinfer.fused_moe", "flashinfer.mhc"):
        monkeypatch.setitem(sys.modules, name, library)
    return library


def built_from(prebuilt, nvcc):
    """`import_module` of a library with these modules prebuilt, and a toolkit or none."""

    def no_toolkit():
        raise RuntimeError("Could not find nvcc")

    def look(name):
        if name == "flashinfer.jit.cpp_ext":
            return SimpleNamespace(get_cuda_path=(lambda: nvcc) if nvcc else no_toolkit)
        return SimpleNamespace(
            **{
                function: lambda module=module: SimpleNamespace(is_aot=module in prebuilt)
                for module, (source, function) in flashinfer.MODULES.items()
                if source == name
            }
        )

    return look


class TestAbsence:
    def test_not_installed(self, fresh):
        def missing(name):
            raise PackageNotFoundError(name)

        fresh.setattr(flashinfer, "version", missing)
        assert flashinfer.absence("sampling") == "flashinfer-python is not installed"
        assert flashinfer.usable() == frozenset()
        with pytest.raises(AssertionError, match="is not installed"):
            flashinfer_sampling.sample_rows(torch.zeros(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64))

    def test_too_old(self, fresh):
        fresh.setattr(flashinfer, "version", lambda _: "0.6.18.post1")
        assert flashinfer.absence() == "flashinfer-python 0.6.18.post1 is older than 0.7"

    def test_no_gpu_or_an_old_one(self, fresh):
        fresh.setattr(torch.cuda, "is_available", lambda: False)
        assert flashinfer.absence() == "there is no GPU"
        fresh.setattr(torch.cuda, "is_available", lambda: True)
        fresh.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert flashinfer.absence() == "its kernels are for sm_80 and later, and this GPU is sm_75"

    def test_a_package_that_it_needs_is_missing(self, fresh):
        def fail(name):
            raise ModuleNotFoundError("No module named 'pynvml'")

        fresh.setattr(flashinfer, "import_module", fail)
        assert flashinfer.absence() == "flashinfer-python cannot be imported: No module named 'pynvml'"

    def test_prebuilt_needs_no_compiler(self, fresh):
        fresh.setattr(flashinfer, "import_module", built_from({"sampling", "mhc"}, None))
        fresh.setattr(flashinfer, "which", lambda _: None)
        assert flashinfer.absence("sampling") is None
        assert flashinfer.usable() == {"flashinfer.sampling", "flashinfer.mhc"}
        assert flashinfer.absence("hash_topk") == (
            "flashinfer-python has no prebuilt hash_topk here, "
            "and to build it there is no nvcc and no ninja and no c++"
        )

    def test_it_has_objections_of_its_own(self, fresh):
        def refuse():
            raise RuntimeError("SM 120 requires CUDA >= 12.8")

        fresh.setattr(flashinfer, "import_module", lambda _: SimpleNamespace(gen_mhc_module=refuse))
        assert flashinfer.absence("mhc") == (
            "flashinfer-python refuses to build mhc: SM 120 requires CUDA >= 12.8"
        )

    def test_a_compiler_will_do(self, fresh, tmp_path):
        fresh.setattr(flashinfer, "import_module", built_from(set(), str(tmp_path)))
        fresh.setattr(flashinfer, "which", lambda name: f"/bin/{name}")
        assert flashinfer.absence("mhc") == (
            "flashinfer-python has no prebuilt mhc here, and to build it there is no nvcc"
        )
        flashinfer._build_failure.cache_clear()
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").touch()
        assert flashinfer.usable() == {f"flashinfer.{module}" for module in flashinfer.MODULES}


EVERYTHING = frozenset({"triton"} | {f"flashinfer.{module}" for module in flashinfer.MODULES})


class TestChoices:
    def test_sampling_in_fast_mode(self):
        fast = partial(sampling.choose, deterministic=False, nucleus=True)
        assert str(fast("sm90", EVERYTHING)) == (
            "sample_rows: flashinfer (fast mode, top_p alone: noise by a row's place in the batch)"
        )
        assert sampling.choose("sm90", EVERYTHING, nucleus=True).implementation == "triton"
        assert fast("sm90", EVERYTHING - {"flashinfer.sampling"}).implementation == "triton"
        assert sampling.choose("sm90", EVERYTHING, deterministic=False).implementation == "triton"
        assert fast("cpu", EVERYTHING).implementation == "reference"

    def test_judging_few_drafts(self):
        assert str(sampling.choose_judge("sm90", EVERYTHING, 64)) == (
            "judge_rows: flashinfer (chain verification of 64 drafts or fewer)"
        )
        assert sampling.choose_judge("sm90", EVERYTHING, 65).implementation == "triton"
        assert sampling.choose_judge("sm90", EVERYTHING, 1, edited=True).implementation == "triton"
        assert sampling.choose_judge("interpreter", EVERYTHING, 1).implementation == "triton"

    def test_hash_routing_in_fast_mode(self):
        fast = partial(routing.choose, "sm90", EVERYTHING, hashed=True, deterministic=False)
        assert str(fast(tokens=routing.MANY)) == (
            "route: flashinfer (fast mode, experts by token id, 512 tokens or more)"
        )
        assert fast(tokens=routing.MANY - 1).implementation == "triton"
        assert routing.choose("sm90", EVERYTHING, True, routing.MANY).implementation == "triton"
        assert routing.choose("sm90", EVERYTHING, False, routing.MANY, False).implementation == "triton"
        assert routing.choose("sm90", frozenset({"triton"}), True, 4096, False).implementation == "triton"

    def test_hyper_connections_are_ours(self):
        assert hyper.choose(4, "sm90", EVERYTHING).implementation == "triton"

    def test_what_is_installed(self, fresh):
        fresh.setattr(flashinfer, "import_module", built_from({"sampling"}, None))
        fresh.setattr(flashinfer, "which", lambda _: None)
        installed.cache_clear()
        assert "flashinfer.sampling" in installed() and "flashinfer.mhc" not in installed()
        fresh.setattr(flashinfer, "version", lambda _: "0.6.18")
        installed.cache_clear()
        assert not any(name.startswith("flashinfer") for name in installed())
        installed.cache_clear()


class TestWhatItIsHanded:
    @pytest.mark.parametrize("params", SETTINGS, ids=str)
    def test_filters_apply_in_order(self, stand_in, params):
        logits = 3 * torch.randn(4, 50)
        temperature, filters = settings(4, params)
        got = flashinfer_sampling.distribution(logits, temperature, **filters)
        torch.testing.assert_close(got.double(), expected(logits, params), atol=1e-6, rtol=1e-4)
        tokens = flashinfer_sampling.sample_rows(logits, temperature, keys(4), **filters)
        assert tokens.dtype == torch.int32
        assert (got[torch.arange(4), tokens.long()] > 0).all()

    def test_rows_with_and_without_filters(self, stand_in):
        logits = 3 * torch.randn(2, 30)
        top_k = torch.tensor([-1, 3], dtype=torch.int32)
        got = flashinfer_sampling.distribution(logits, torch.ones(2), top_k=top_k)
        assert (got > 0).sum(1).tolist() == [30, 3]

    def test_greedy_rows_are_the_first_best(self, stand_in):
        logits = torch.randn(3, 20)
        logits[1, 4] = logits[1, 9] = 8
        tokens = flashinfer_sampling.sample_rows(logits, torch.tensor([0, 0, 1.0]), keys(3))
        assert tokens[:2].tolist() == logits[:2].argmax(1).tolist() and tokens[1] == 4

    def test_masked_tokens_and_next_to_no_temperature(self, stand_in):
        logits = torch.randn(2, 20)
        logits[0, 1:] = -math.inf
        tokens = flashinfer_sampling.sample_rows(logits, torch.tensor([1, 1e-42]), keys(2), greedy=False)
        assert tokens.tolist() == [0, int(logits[1].argmax())]

    def test_no_rows(self, stand_in):
        none = torch.empty(0)
        assert flashinfer_sampling.sample_rows(torch.empty(0, 9), none, none.long()).shape == (0,)
        drafts = torch.empty(0, 2, dtype=torch.int32)
        verified = flashinfer_sampling.verify_chain(
            drafts, torch.empty(0, 2, 9), torch.empty(0, 3, 9), none.long()
        )
        assert verified.tokens.shape == (0, 3) and verified.kept.shape == (0,)
        h = torch.empty(0, 4, 64, dtype=torch.bfloat16)
        gathered, mix = flashinfer_hyper.pre(h, mixer(64))
        assert gathered.shape == (0, 64)
        assert flashinfer_hyper.post(h, h[:, :1], mix).shape == (0, 4, 64)

    def test_chains(self, stand_in):
        drafts = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
        odds = torch.nn.functional.one_hot(drafts.long(), 5).float()
        model = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4], [0, 1, 4]]), 5).float()
        verified = flashinfer_sampling.verify_chain(drafts, odds, model, keys(2))
        assert verified.tokens.tolist() == [[3, 1, 4], [0, 1, -1]]
        assert verified.kept.tolist() == [2, 1]

    @pytest.mark.parametrize("filtered", [False, True])
    def test_rows_of_the_wrapper(self, stand_in, monkeypatch, filtered):
        """Rows that are parts of wider ones, one of them greedy, one with a mask of three tokens."""
        logits = torch.randn(3, 80)[:, :70]
        rows = rows_of([0.0, 0.7, 1.0], top_k=2 if filtered else 0)
        words = torch.zeros(1, 3, dtype=torch.int32)
        words[0, 1] = 0b10011
        masks = sampling.Masks(words, torch.tensor([-1, -1, 0], dtype=torch.int32))
        scores = sampling.Scores(logits, masks)
        masked = partial(sampling.apply_bitmask, implementation="reference")
        monkeypatch.setattr(flashinfer_sampling, "apply_bitmask", masked)
        before = logits.clone()
        for _ in range(5):
            tokens = sampling.sample_rows(scores, rows, implementation="flashinfer").tolist()
            assert tokens[0] == int(logits[0].argmax()) and tokens[2] in (32, 33, 36)
            assert not filtered or tokens[1] in logits[1].topk(2).indices.tolist()
        assert torch.equal(logits, before)

    def test_an_engine_in_fast_mode(self, stand_in, monkeypatch):
        """Rows that the library can draw go to it; what an engine asks for arrives there as it would with ours."""
        monkeypatch.setattr(sampling, "installed", lambda: EVERYTHING)
        monkeypatch.setattr(sampling, "arch", lambda _: "sm90")
        drawn = []
        monkeypatch.setattr(
            flashinfer_sampling, "draw", lambda scores, rows: drawn.append(rows) or rows.keys.int()
        )
        warm, greedy = SamplingParams(temperature=0.5, top_p=0.3), SamplingParams(temperature=0)
        draws = [Draw(warm, 1, 2), Draw(greedy, 1, 2)]
        device_sampler.sample(torch.randn(2, 9), draws, deterministic=False)
        assert drawn[0].top_p.tolist() == [0.3, 1]
        assert drawn[0].warm.tolist() == [0] and drawn[0].filtered.tolist() == [0]

    def test_what_the_wrapper_does_not_hand_on(self, stand_in):
        refused = sampling.Refused(torch.zeros(1, 9, dtype=torch.float64), torch.zeros(1, dtype=torch.int32))
        scores = sampling.Scores(torch.randn(1, 9))
        with pytest.raises(AssertionError, match="refused"):
            sampling.sample_rows(scores, rows_of([1.0]), refused=refused, implementation="flashinfer")

    def test_drafts_of_the_wrapper(self, stand_in):
        """What was drafted with odds of at most the model's is accepted, what the model never says is not."""
        logits = torch.randn(2, 9)
        logits[1, 4] = -math.inf
        drafts = torch.tensor([3, 4], dtype=torch.int32)
        odds = torch.softmax(logits.double(), 1)[torch.arange(2), drafts.long()].clamp_min(0.1)
        odds[0] /= 2
        judged = sampling.judge_rows(
            sampling.Scores(logits), rows_of([1.0, 1.0]), drafts, odds, implementation="flashinfer"
        )
        assert judged.tolist() == [3, sampling.REJECTED]

    def test_hash_routes(self, stand_in):
        check_routes(*routes(7, 32, "cpu"))

    def test_padding_reads_no_row_before_the_table(self, stand_in):
        scores, table, ids, scaling = routes(5, 32, "cpu")
        ids[2] = -1
        experts, weights = flashinfer_routing.hash_routes(scores, table, ids, scaling)
        assert ((experts >= 0) & (experts <= 32)).all() and weights.isfinite().all()

    def test_routes_of_the_wrapper(self, stand_in):
        _, table, ids, scaling = routes(5, 32, "cpu")
        ids[1] = -1
        x, gate = torch.randn(5, 64), FloatWeight.of(torch.randn(32, 64) / 8)
        call = partial(routing.route, x, gate, None, table, ids, 6, scaling)
        got, want = call(implementation="flashinfer"), call(implementation="reference")
        assert torch.equal(got.experts, want.experts)
        torch.testing.assert_close(got.weights, want.weights)

    def test_a_sublayer_of_the_wrapper(self, stand_in):
        """Both outputs are bfloat16 of the same values but for a rounding in between: two units."""
        h, y = (torch.randn(3, n, 64).bfloat16() for n in (4, 2))
        m, norm = hyper.Mixer(**vars(mixer(64))), torch.rand(64) + 0.5
        _, mix = hyper.hyper_pre(h, m, norm, implementation="reference")
        call = partial(hyper.hyper_post_pre, h, y, mix, m, norm)
        for got, want in zip(call(implementation="flashinfer"), call(implementation="reference"), strict=True):
            columns = slice(4, None) if got.shape[-1] == 24 else slice(None)  # pre is not given back
            torch.testing.assert_close(got[..., columns], want[..., columns], atol=2e-2, rtol=2.0**-6)

    def test_streams(self, stand_in):
        check_streams(3, 64, "cpu")

    def test_streams_that_it_has_no_kernel_for(self, stand_in):
        assert flashinfer_hyper.fits(4, 4096, torch.bfloat16)
        assert not flashinfer_hyper.fits(4, 4096, torch.float32)
        assert not flashinfer_hyper.fits(2, 4096, torch.bfloat16)
        with pytest.raises(AssertionError, match="float32"):
            flashinfer_hyper.pre(torch.zeros(1, 4, 64), mixer(64))


@pytest.mark.skipif(
    not any(metadata.Distribution.discover(name="flashinfer-python")), reason="flashinfer-python is not installed"
)
def test_the_stand_in_has_its_parameters():
    from flashinfer import mhc, sampling
    from flashinfer.fused_moe import hash_topk

    theirs = {"hash_topk": hash_topk, **vars(mhc), **vars(sampling)}
    for name, ours in inspect.getmembers(StandIn(), inspect.ismethod):
        if not name.startswith("_"):
            assert set(inspect.signature(ours).parameters) <= set(inspect.signature(theirs[name]).parameters), name
