"""FlashInfer: why it is absent, what it is handed (held against a stand-in), and on a GPU, whether it keeps the
distributions, routes and streams that it is taken for."""

import inspect
import math
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
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
    settings,
)
from weft.kernels.libraries import flashinfer, flashinfer_hyper, flashinfer_routing, flashinfer_sampling


@pytest.fixture
def fresh(monkeypatch):
    """Nothing of what this machine has, and nothing remembered of what a test made of it."""
    for remembered in (flashinfer._import_failure, flashinfer._build_failure):
        remembered.cache_clear()
    monkeypatch.setattr(flashinfer, "version", lambda _: "0.7.2.post1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    yield monkeypatch
    for remembered in (flashinfer._import_failure, flashinfer._build_failure):
        remembered.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flashinfer, "absence", lambda module=None: None)
    library = StandIn()
    for name in ("flashinfer", "flashinfer.sampling", "flashinfer.fused_moe", "flashinfer.mhc"):
        monkeypatch.setitem(sys.modules, name, library)
    return library


@pytest.fixture
def real(request):
    """The library itself, for the module that a test is about."""
    reason = flashinfer.absence(request.param)
    if reason is not None:
        pytest.skip(reason)


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

    def test_hash_routes(self, stand_in):
        check_routes(*routes(7, 32, "cpu"))

    def test_padding_reads_no_row_before_the_table(self, stand_in):
        scores, table, ids, scaling = routes(5, 32, "cpu")
        ids[2] = -1
        experts, weights = flashinfer_routing.hash_routes(scores, table, ids, scaling)
        assert ((experts >= 0) & (experts <= 32)).all() and weights.isfinite().all()

    def test_streams(self, stand_in):
        check_streams(3, 64, "cpu")

    def test_streams_that_it_has_no_kernel_for(self, stand_in):
        assert flashinfer_hyper.fits(4, 4096, torch.bfloat16)
        assert not flashinfer_hyper.fits(4, 4096, torch.float32)
        assert not flashinfer_hyper.fits(2, 4096, torch.bfloat16)
        with pytest.raises(AssertionError, match="float32"):
            flashinfer_hyper.pre(torch.zeros(1, 4, 64), mixer(64))


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer-python is not installed")
def test_the_stand_in_has_its_parameters():
    from flashinfer import mhc, sampling
    from flashinfer.fused_moe import hash_topk

    theirs = {"hash_topk": hash_topk, **vars(mhc), **vars(sampling)}
    for name, ours in inspect.getmembers(StandIn(), inspect.ismethod):
        if not name.startswith("_"):
            assert set(inspect.signature(ours).parameters) <= set(inspect.signature(theirs[name]).parameters), name


def is_drawn_from(tokens, probabilities):
    """Pearson's test, at four standard deviations of its statistic and some more for few tokens: one in ten thousand
    or so fails by chance."""
    counts = torch.bincount(tokens.long().cpu(), minlength=len(probabilities)).double()
    want = probabilities * len(tokens)
    assert counts[want == 0].sum() == 0
    rare = want < 5
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    want = torch.cat((want[~rare], want[rare].sum()[None]))
    observed, want = observed[want > 0], want[want > 0]
    freedom = max(len(want) - 1, 1)
    statistic = ((observed - want) ** 2 / want).sum().item()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8, (statistic, freedom)


@pytest.mark.gpu
@pytest.mark.parametrize("real", ["sampling"], indirect=True)
class TestSamplingOnAGpu:
    @pytest.mark.parametrize("params", SETTINGS, ids=str)
    def test_tokens_have_the_distribution(self, real, device, params):
        rows = 1 << 16
        logits = 2 * torch.randn(1, 40)
        temperature, filters = settings(rows, params, device)
        many = logits.to(device).expand(rows, -1).contiguous()
        tokens = flashinfer_sampling.sample_rows(many, temperature, keys(rows, device), **filters)
        is_drawn_from(tokens, expected(logits, params)[0])

    @pytest.mark.parametrize("params", SETTINGS, ids=str)
    def test_probabilities_of_a_whole_vocabulary(self, real, device, params):
        """float32 scores of up to 50 are off by 2^-19, and so are their exponentials, relatively; one token more
        or less at the cut of top_p is one of thousands."""
        logits = 4 * torch.randn(3, 129280)
        temperature, filters = settings(3, params, device)
        got = flashinfer_sampling.distribution(logits.to(device), temperature, **filters).cpu().double()
        assert ((got - expected(logits, params)).abs().sum(1) < 1e-3).all()

    def test_greedy_rows(self, real, device):
        logits = torch.randn(64, 129280, device=device)
        logits[:, 777] = logits[:, 77] = 9
        temperature = torch.zeros(64, device=device)
        assert flashinfer_sampling.sample_rows(logits, temperature, keys(64, device)).eq(77).all()

    def test_the_same_call_gives_the_same_tokens(self, real, device):
        logits = torch.randn(64, 129280, device=device)
        temperature, filters = settings(64, SETTINGS[-1], device)
        calls = [flashinfer_sampling.sample_rows(logits, temperature, keys(64, device), **filters) for _ in "ab"]
        assert torch.equal(*calls)

    def test_a_token_depends_on_its_place(self, real, device):
        """Why deterministic engines never choose it."""
        same = keys(1, device).expand(64).contiguous()
        tokens = flashinfer_sampling.sample_rows(
            torch.zeros(64, 500, device=device), torch.ones(64, device=device), same
        )
        assert len(tokens.unique()) > 1

    def test_a_graph_draws_anew(self, real, device):
        logits = torch.randn(8, 129280, device=device)
        temperature, filters = settings(8, SETTINGS[-1], device)
        noise = keys(8, device)

        def call():
            return flashinfer_sampling.sample_rows(logits, temperature, noise, **filters)

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for seed in range(2):
            noise.copy_(keys(8, seed=seed))
            graph.replay()
            assert torch.equal(captured, call())

    @pytest.mark.parametrize("certain", [False, True])
    def test_verified_chains_have_the_distribution(self, real, device, certain):
        """Whatever the drafts: the first token is the model's, and behind drafts that are kept so is the next."""
        chains, drafted, width = 1 << 15, 2, 30
        model = torch.softmax(torch.randn(drafted + 1, width), 1)
        odds = torch.softmax(torch.randn(drafted, width), 1)
        if certain:
            odds = torch.nn.functional.one_hot(torch.tensor([4, 11]), width).float()
        drafts = torch.multinomial(odds, chains, replacement=True).t().int().contiguous().to(device)
        verified = flashinfer_sampling.verify_chain(
            drafts,
            odds.to(device).expand(chains, -1, -1).contiguous(),
            model.to(device).expand(chains, -1, -1).contiguous(),
            keys(chains, device),
        )
        tokens, kept = verified.tokens, verified.kept
        place = torch.arange(drafted + 1, device=device)
        assert torch.equal(tokens[:, :-1] == drafts, place[:-1] < kept[:, None])
        assert torch.equal(tokens == -1, place > kept[:, None])
        for i in range(drafted + 1):
            is_drawn_from(tokens[kept >= i, i], model[i].double())


@pytest.mark.gpu
@pytest.mark.parametrize("real", ["hash_topk"], indirect=True)
class TestHashRoutesOnAGpu:
    @pytest.mark.parametrize("tokens", [1, 33, 4096])
    def test_against_float64(self, real, device, tokens):
        check_routes(*routes(tokens, 256, device))

    def test_a_row_alone_has_the_same_bits(self, real, device):
        scores, table, ids, scaling = routes(37, 256, device)
        whole = flashinfer_routing.hash_routes(scores, table, ids, scaling)
        alone = flashinfer_routing.hash_routes(scores[5:6], table, ids[5:6], scaling)
        assert all(torch.equal(a[5:6], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("real", ["mhc"], indirect=True)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 4096), (65, 7168), (5, 64), (512, 4096)])
def test_streams_on_a_gpu(real, device, tokens, dim):
    check_streams(tokens, dim, device)
