"""FlashInfer on a GPU: whether it keeps the distributions, routes and streams that it is taken for."""

import math
from functools import partial

import pytest
import torch

from support.flashinfer import (
    SETTINGS,
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
from weft.kernels.gpu.weights import FloatWeight
from weft.kernels.libraries import flashinfer, flashinfer_routing, flashinfer_sampling


@pytest.fixture
def real(request):
    """The library itself, for the module that a test is about."""
    reason = flashinfer.absence(request.param)
    if reason is not None:
        pytest.skip(reason)


def is_drawn_from(tokens, probabilities):
    """Pearson's test, at four standard deviations of its statistic and some more for few tokens: one in ten
    thousand or so fails by chance."""
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
        logits[0, 30:] = -math.inf
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

    def test_rows_of_the_wrapper(self, real, device):
        """Rows that are parts of wider ones, every second one greedy, every third one with a mask of three."""
        logits = torch.randn(66, 5000, device=device)[:, :4000]
        rows = rows_of([0.0, 0.7] * 33, top_k=50, device=device)
        words = torch.zeros(1, 125, dtype=torch.int32, device=device)
        words[0, 3] = 0b10011
        slots = torch.tensor([0, -1, -1] * 22, dtype=torch.int32, device=device)
        scores = sampling.Scores(logits, sampling.Masks(words, slots))
        tokens = sampling.sample_rows(scores, rows, implementation="flashinfer")
        assert set(tokens[::3].tolist()) <= {96, 97, 100}
        own = sampling.sample_rows(scores, rows, implementation="reference")
        assert torch.equal(tokens[::2], own[::2])

    def test_drafts_of_the_wrapper(self, real, device):
        """A draft is accepted as often as its probability over the odds that it was drafted with."""
        rows = 1 << 14
        logits = torch.randn(1, 40)
        p = torch.softmax(logits[0].double(), 0)[7]
        judged = sampling.judge_rows(
            sampling.Scores(logits.to(device).expand(rows, -1).contiguous()),
            rows_of([1.0] * rows, device=device),
            torch.full((rows,), 7, dtype=torch.int32, device=device),
            torch.full((rows,), 2 * p.item(), dtype=torch.float64, device=device),
            implementation="flashinfer",
        )
        assert set(judged.tolist()) == {7, sampling.REJECTED}
        assert abs((judged == 7).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(rows)

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

    def test_routes_of_the_wrapper(self, real, device):
        """Products of bfloat16 are exact in float32, their sums are not: 2^-12 of a weight covers 4096 terms."""
        _, table, ids, scaling = routes(2000, 256, device)
        ids[1] = -1
        x = torch.randn(2000, 4096, device=device).bfloat16()
        gate = FloatWeight.of((torch.randn(256, 4096, device=device) / 64).bfloat16())
        call = partial(routing.route, x, gate, None, table, ids, 6, scaling)
        got, want = call(implementation="flashinfer"), call(implementation="reference")
        assert torch.equal(got.experts, want.experts)
        torch.testing.assert_close(got.weights, want.weights, rtol=2.0**-12, atol=0)

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


@pytest.mark.gpu
@pytest.mark.parametrize("real", ["mhc"], indirect=True)
def test_a_sublayer_of_the_wrapper(real, device):
    """What both gather is rounded once more by the library before the norm, and a value of the streams may be
    rounded the other way: two units of bfloat16 of values of about 1 and of some times that."""
    h, y = (torch.randn(70, n, 4096, device=device).bfloat16() for n in (4, 7))
    m, norm = hyper.Mixer(**vars(mixer(4096, device))), torch.rand(4096, device=device) + 0.5
    _, mix = hyper.hyper_pre(h, m, norm)
    call = partial(hyper.hyper_post_pre, h, y, mix, m, norm)
    for got, want in zip(call(implementation="flashinfer"), call(implementation="triton"), strict=True):
        columns = slice(4, None) if got.shape[-1] == 24 else slice(None)  # pre is not given back
        torch.testing.assert_close(got[..., columns], want[..., columns], atol=2e-2, rtol=2.0**-6)
