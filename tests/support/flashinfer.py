"""FlashInfer for tests: a stand-in for machines without it, and checks that both have to pass."""

import math
from types import SimpleNamespace

import torch

from weft.kernels.gpu.sampling import RowSettings
from weft.kernels.libraries import flashinfer_hyper, flashinfer_routing
from weft.runtime.decoding.noise import stream_key
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.sampler import Draw, distribution

SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
)


class StandIn:
    """Functions of the names and parameters of flashinfer-python 0.7.2.post1, in PyTorch. It stands in for the
    package and for each of its modules that is imported."""

    @property
    def sampling(self):
        return self

    @property
    def mhc(self):
        return self

    def softmax(self, logits, temperature):
        assert logits.dtype == temperature.dtype == torch.float32 and (temperature > 0).all()
        return torch.softmax(logits * (1 / temperature)[:, None], 1)

    def top_k_renorm_probs(self, probs, top_k):
        assert top_k.dtype == torch.int32 and (top_k > 0).all()
        order = probs.argsort(1, descending=True).argsort(1)
        kept = probs.masked_fill(order >= top_k[:, None], 0)
        return kept / kept.sum(1, keepdim=True)

    def top_p_renorm_probs(self, probs, top_p):
        ordered, ids = probs.sort(1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p[:, None], 0)
        return torch.zeros_like(probs).scatter(1, ids, ordered / ordered.sum(1, keepdim=True))

    def sampling_from_probs(self, probs, seed, offset):
        assert seed.dtype == offset.dtype == torch.int64 and seed.shape == probs.shape[:1] and offset.shape == (1,)
        draw = torch.Generator().manual_seed(int(seed[0]) & (1 << 62) - 1)
        return torch.multinomial(probs, 1, generator=draw)[:, 0].int()

    def top_p_sampling_from_probs(self, probs, top_p, seed, offset):
        return self.sampling_from_probs(self.top_p_renorm_probs(probs, top_p), seed, offset)

    def min_p_sampling_from_probs(self, probs, min_p, seed, offset):
        kept = probs.masked_fill(probs < min_p[:, None] * probs.amax(1, keepdim=True), 0)
        return self.sampling_from_probs(kept, seed, offset)

    def chain_speculative_sampling(self, draft_probs, draft_token_ids, target_probs, seed, offset):
        assert seed.dtype == offset.dtype == torch.int64 and draft_token_ids.dtype == torch.int32
        tokens = torch.full((len(seed), target_probs.shape[1]), -1, dtype=torch.int32)
        kept = torch.zeros(len(seed), dtype=torch.int32)
        for row, drafts in enumerate(draft_token_ids.tolist()):
            place = 0
            while place < len(drafts):
                ratio = target_probs[row, place, drafts[place]] / draft_probs[row, place, drafts[place]]
                if torch.rand(()) >= ratio:
                    break
                tokens[row, place] = drafts[place]
                place += 1
            rest = target_probs[row, place]
            if place < len(drafts):
                rest = (rest - draft_probs[row, place]).clamp_min(0)
            tokens[row, place] = int(torch.multinomial(rest, 1))
            kept[row] = place
        return tokens, kept.clone(), kept

    def hash_topk(self, router_logits, input_ids, tid2eid, num_fused_shared_experts, routed_scaling_factor):
        assert router_logits.dtype == torch.float32 and input_ids.dtype == torch.int64
        assert (input_ids >= 0).all() and (num_fused_shared_experts, routed_scaling_factor) == (1, 1.0)
        chosen = tid2eid[input_ids]
        weights = torch.nn.functional.softplus(router_logits.gather(1, chosen.long())).sqrt()
        weights = weights / weights.sum(1, keepdim=True)
        shared = torch.full_like(chosen[:, :1], router_logits.shape[1])
        return torch.cat((weights, torch.ones_like(weights[:, :1])), 1), torch.cat((chosen, shared), 1)

    def mhc_pre_big_fuse_with_prenorm(
        self,
        dot_mix,
        residual,
        mhc_scale,
        mhc_base,
        rms_eps,
        mhc_pre_eps,
        mhc_sinkhorn_eps,
        mhc_post_mult_value,
        sinkhorn_repeat,
    ):
        assert dot_mix.shape == (len(residual), 24) and dot_mix.dtype == torch.float32
        assert residual.dtype == torch.bfloat16 and mhc_pre_eps == mhc_sinkhorn_eps and mhc_post_mult_value == 2
        square = residual.float().flatten(1).square().mean(1, keepdim=True)
        m = SimpleNamespace(scale=mhc_scale, base=mhc_base, iterations=sinkhorn_repeat, hc_eps=mhc_pre_eps)
        gates, post, comb = mix_of(dot_mix * (square + rms_eps).rsqrt(), m)
        gathered = (gates[:, :, None] * residual.double()).sum(1).bfloat16()
        return post.float()[:, :, None], comb.float(), gathered

    def mhc_post(self, x, residual, post_layer_mix, comb_res_mix):
        assert x.dtype == residual.dtype == torch.bfloat16 and x.shape == residual[:, 0].shape
        mixed = comb_res_mix.transpose(1, 2) @ residual.float()
        return (mixed + post_layer_mix[:, :, None] * x.float()[:, None]).bfloat16()


def settings(rows, params, device="cpu"):
    """What `sample_rows` takes, of rows with the same parameters: temperatures, and the filters that are on."""
    p = SamplingParams(**params)
    filters = {
        "top_k": torch.full((rows,), p.top_k, dtype=torch.int32, device=device) if p.top_k > 0 else None,
        "top_p": torch.full((rows,), p.top_p, device=device) if p.top_p < 1 else None,
        "min_p": torch.full((rows,), p.min_p, device=device) if p.min_p > 0 else None,
    }
    return torch.full((rows,), p.temperature, device=device), filters


def rows_of(temperatures, top_k=0, device="cpu"):
    """Rows with these temperatures, as `weft.kernels.gpu.sampling` takes them."""
    count = len(temperatures)
    warm = torch.tensor([i for i, t in enumerate(temperatures) if t > 0], dtype=torch.int32, device=device)
    return RowSettings(
        temperature=torch.tensor(temperatures, device=device),
        top_k=torch.full((count,), top_k, dtype=torch.int32, device=device),
        top_p=torch.ones(count, dtype=torch.float64, device=device),
        min_p=torch.zeros(count, dtype=torch.float64, device=device),
        keys=keys(count, device),
        warm=warm,
        filtered=warm if top_k else warm[:0],
        counters=torch.zeros(count, dtype=torch.int32, device=device),
    )


def keys(rows, device="cpu", seed=7):
    return torch.tensor([stream_key(seed, i) for i in range(rows)], dtype=torch.int64, device=device)


def expected(logits, params):
    """[n, V] float64."""
    draws = [Draw(SamplingParams(**params), 0, 0) for _ in logits]
    return distribution(logits.cpu(), draws)


def routes(tokens, experts, device):
    """Arguments of `hash_routes`."""
    table = torch.stack([torch.randperm(experts)[:6].sort().values for _ in range(100)]).int()
    ids = torch.randint(100, (tokens,), dtype=torch.int32)
    return (4 * torch.randn(tokens, experts)).to(device), table.to(device), ids.to(device), 1.5


def check_routes(scores, table, ids, scaling):
    """A logarithm, an exponential, a root, two divisions and six additions, each within a few units: 2^-19."""
    experts, weights = flashinfer_routing.hash_routes(scores, table, ids, scaling)
    chosen = table[ids.long()]
    assert torch.equal(experts[:, :-1], chosen) and experts[:, -1].eq(scores.shape[1]).all()
    want = torch.nn.functional.softplus(scores.double().gather(1, chosen.long())).sqrt()
    want = want / want.sum(1, keepdim=True) * scaling
    torch.testing.assert_close(weights[:, :-1].double(), want, rtol=2.0**-19, atol=0)
    assert weights[:, -1].eq(1).all()


def mixer(dim, device="cpu"):
    return SimpleNamespace(
        fn=torch.randn(24, 4 * dim, device=device) / math.sqrt(4 * dim),
        base=torch.randn(24, device=device),
        scale=torch.rand(3, device=device) + 0.5,
        iterations=20,
        hc_eps=1e-6,
        norm_eps=1e-6,
    )


def mix_of(products, m):
    """[T, 24] normalised products with a mixer -> pre, post and comb in float64, without the code under test."""
    each = torch.tensor([4, 4, 16], device=products.device)
    logits = products.double() * m.scale.double().repeat_interleave(each) + m.base.double()
    comb = logits[:, 8:].view(-1, 4, 4).softmax(2) + m.hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + m.hc_eps)
    for _ in range(m.iterations - 1):
        comb = comb / (comb.sum(2, keepdim=True) + m.hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + m.hc_eps)
    return logits[:, :4].sigmoid() + m.hc_eps, 2 * logits[:, 4:8].sigmoid(), comb


def check_streams(tokens, dim, device):
    """Gates are float32 behind a float32 product of 4 * dim terms: 1e-4 covers its roundings. What is bfloat16 is
    rounded once: 2^-8 of itself, and 1e-4 of the terms that it is the sum of."""
    h = torch.randn(tokens, 4, dim, device=device).bfloat16()
    m = mixer(dim, device)
    gathered, mix = flashinfer_hyper.pre(h, m)
    flat = h.double().flatten(1)
    products = flat @ m.fn.double().t() * (flat.square().mean(1, keepdim=True) + m.norm_eps).rsqrt()
    into, spread, comb = mix_of(products, m)
    torch.testing.assert_close(mix[:, 4:8].double(), spread, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mix[:, 8:].view(-1, 4, 4).double(), comb, rtol=1e-4, atol=1e-5)
    _close(gathered, into[:, :, None] * h.double())
    y = torch.randn(tokens, 3, dim, device=device).bfloat16()
    _check_post(h, y[:, :1].contiguous(), mix, 0)
    _check_post(h, y, mix, 2.0**-7)  # the sum over parts may be rounded the other way


def _check_post(h, y, mix, slack):
    total = y.double().sum(1).bfloat16().double()
    given = mix.double()
    new = given[:, 4:8, None] * total[:, None]
    old = given[:, 8:].view(-1, 4, 4)[:, :, :, None] * h.double()[:, :, None]
    _close(flashinfer_hyper.post(h, y, mix), torch.cat((new[:, None], old), 1), slack)


def _close(got, terms, slack=0.0):
    """terms: [T, n, ...] float64, summed over n."""
    want, size = terms.sum(1), terms.abs().sum(1)
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + (1e-4 + slack) * size).all()
