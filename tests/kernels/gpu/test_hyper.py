"""Streams spread, mixed, gathered and normalised, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernels import U16, U32, assert_within, gamma, same_bits
from weft.kernels.gpu.hyper import (
    HeadMixer,
    Mixer,
    choose,
    hyper_head,
    hyper_post,
    hyper_post_pre,
    hyper_pre,
    least_bytes,
    rms_norm,
)
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.reference import hyper as reference
from weft.kernels.reference.hyper import example

Given = dict[str, Any]


def unit(dtype: torch.dtype) -> float:
    return U16 if dtype == torch.bfloat16 else U32


def assert_streams(out: Tensor, h: Tensor, y: Tensor, mix: Tensor) -> None:
    """Five products and their sum, then one rounding. The parts' sum errs in float32, and rounds by half a
    bfloat16 step; the reference, which rounds too, may be on the other side of it."""
    want = reference.post(h, y, mix)
    magnitude = reference.post(h.abs().double(), y.abs().double(), mix.abs())
    parts = (gamma(y.shape[1]) * y.double().abs().sum(1) + 2 * unit(h.dtype) * y.double().sum(1).abs()) * (
        y.shape[1] > 1 or y.dtype != h.dtype
    )
    bound = gamma(6) * magnitude + mix[:, 4:8, None].double().abs() * parts[:, None]
    assert_within(out.double(), want, bound + unit(h.dtype) * (want.abs() + bound))


def logits(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What gates and matrix are made of, float64, and how far float32 may be from it.

    Products with bfloat16 are exact, others round; within a block sums go over 128 terms in some order, then over
    the blocks. Tensor cores cut where others round: twice the unit. The squares likewise, halved by the root.
    """
    flat = h.double().flatten(1)
    terms = 4 * 32 + -(-h.shape[2] // 32) + 4
    want = reference.mix(h.double(), fn, base, scale, eps)
    inverse = torch.rsqrt((flat * flat).mean(1, keepdim=True) + eps)
    size = (flat.abs() @ fn.double().abs().T) * inverse * scale.double().abs()
    return want, 2 * gamma(terms) * 1.5 * size + gamma(4) * (want.abs() + base.abs().double())


def gate_bound(logit: Tensor, error: Tensor) -> Tensor:
    """Of 1 / (1 + exp(-x)): the slope is 1/4 at most. exp(-x) has a relative error of (|x| + 2) 2^-22 (x times
    log2(e) rounds, and exp2 is approximate), where a sigmoid's slope is that against the exponent's own: 1/4
    again."""
    return 0.25 * (error + (logit.abs() + 2) * 2.0**-22) + 4 * U32


def comb_bound(logit: Tensor, error: Tensor, iterations: int) -> Tensor:
    """Relative. Scales r and c are sums of positive terms, so that a step passes on relative errors unchanged and
    adds those of the entries and its own (7 roundings, and 2^-21.8 of its reciprocal): they grow by a step's each
    time. Entries err by their logit's error, twice (their row is divided by its sum), and by exp's."""
    span = logit.abs().amax(1, keepdim=True)
    entry = 2 * error.amax(1, keepdim=True) + 2 * (2 * span + 2) * 2.0**-22 + 2.0**-20
    return (4 * iterations) * (entry + 7 * U32 + 2.0**-21.8)


def assert_mixed(x: Tensor, mix: Tensor, h: Tensor, mixer: Mixer, norm: Tensor) -> None:
    counts = torch.tensor([4, 4, 16], device=h.device)
    logit, error = logits(h, mixer.fn, mixer.base, mixer.scale.repeat_interleave(counts), mixer.norm_eps)
    want = reference.gates(logit, 4, mixer.iterations, mixer.hc_eps)
    gates = gate_bound(logit[:, :8], error[:, :8])
    assert_within(mix[:, :4].double(), want[:, :4], gates[:, :4])
    assert_within(mix[:, 4:8].double(), want[:, 4:8], 2 * gates[:, 4:])
    relative = comb_bound(logit[:, 8:], error[:, 8:], mixer.iterations)
    assert_within(mix[:, 8:].double(), want[:, 8:], relative * want[:, 8:])
    assert_gathered(x, h, want[:, :4], gates[:, :4], norm, mixer.norm_eps)


def assert_gathered(x: Tensor, h: Tensor, pre: Tensor, error: Tensor, norm: Tensor, eps: float) -> None:
    """Four products; then a norm over D, as in `support.norms`: sums of up to 64 a thread, halved by the root."""
    wide = h.double()
    gathered = reference.gather(wide, pre)
    bound = reference.gather(wide.abs(), error) + gamma(5) * reference.gather(wide.abs(), pre)
    scale = torch.rsqrt((gathered * gathered).mean(1, keepdim=True) + eps) * norm.double().abs()
    want = reference.rms_norm(gathered, norm, eps)
    relative = 40 * U32 + bound.norm(dim=1, keepdim=True) / gathered.norm(dim=1, keepdim=True).clamp_min(1e-30)
    bound = bound * scale + want.abs() * relative
    assert_within(x.double(), want, bound + unit(x.dtype) * (want.abs() + bound))


def check(given: Given, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, x, mix = hyper_post_pre(**given, **how)
    h, norm = given["h"], given["norm"]
    assert out.dtype == x.dtype == h.dtype and mix.dtype == torch.float32
    assert_streams(out, h, given["y"], given["mix"])
    assert_mixed(x, mix, out, given["mixer"], norm)
    return out, x, mix


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "parts"), [(64, 1), (104, 4)])
def test_small(implementation: str, dtype: torch.dtype, dim: int, parts: int, device: str) -> None:
    check(example(3, device, dim=dim, parts=parts, dtype=dtype), implementation=implementation)


def test_at_the_models_size(device: str) -> None:
    """And what it moves; the new streams are read once more, as `least_bytes` says."""
    given = example(2, device, parts=7)
    if device == "cuda":
        check(given)
        return
    with traffic() as moved:
        check(given)
    assert moved.total <= 1.3 * least_bytes(2, 4096, 7, 2)


def test_the_ends_of_a_model(device: str) -> None:
    """The first sublayer has no output before it, and the readout none behind: the same bits as in one."""
    given = example(5, device, dim=96, parts=2)
    out, x, mix = hyper_post_pre(**given)
    assert same_bits(hyper_post(given["h"], given["y"], given["mix"]), out)
    first, new = hyper_pre(out, given["mixer"], given["norm"])
    assert same_bits(first, x) and same_bits(new, mix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_readout(dtype: torch.dtype, device: str) -> None:
    given = example(3, device, dim=72, dtype=dtype)
    whole: Mixer = given["mixer"]
    mixer = HeadMixer(whole.fn[:4].contiguous(), whole.base[:4], whole.scale[1:2], 1e-6, 1e-5)
    h, norm = given["h"], given["norm"]
    logit, error = logits(h, mixer.fn, mixer.base, mixer.scale.expand(4), 1e-5)
    x = hyper_head(h, mixer, norm)
    assert_gathered(x, h, torch.sigmoid(logit) + 1e-6, gate_bound(logit, error), norm, 1e-5)
    assert_within(hyper_head(h, mixer, norm, implementation="reference").double(), x.double(), 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [40, 1024])
def test_rms_norm(dtype: torch.dtype, dim: int, device: str) -> None:
    x = (torch.randn(4, dim + 8, device=device) * 5).to(dtype)[:, 8:]  # a column slice of wider rows
    x[1] = 0.0
    weight = torch.randn(dim, device=device)
    want = reference.rms_norm(x.double(), weight, 1e-6)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    assert_within(got.double(), want, (unit(dtype) + 40 * U32) * want.abs())
    assert same_bits(rms_norm(x[2:3], weight, 1e-6), got[2:3])


def test_matrices_of_known_logits(device: str) -> None:
    """With fn = 0 the logits are `base`: even and uneven ones, and some of which softmax leaves only hc_eps. Of
    the iterations each counts: uneven matrices are far from converged."""
    given = example(1, device, dim=32, dtype=torch.float32)
    for iterations in (1, 2, 20):
        for size in (0.0, 1.0, 8.0, 60.0):
            base = torch.randn(24, device=device) * size
            mixer = replace(
                given["mixer"], fn=torch.zeros_like(given["mixer"].fn), base=base, iterations=iterations
            )
            x, mix = hyper_pre(given["h"], mixer, given["norm"])
            assert_mixed(x, mix, given["h"], mixer, given["norm"])
            if size <= 1.0:  # hc_eps counts in columns of next to nothing
                columns = mix[:, 8:].unflatten(1, (4, 4)).sum(1).double()
                assert_within(columns.cpu(), torch.ones(1, 4).double(), 1e-5)


def test_extremes(device: str) -> None:
    given = example(5, device, dim=64, parts=2, dtype=torch.float32)
    given["h"][0], given["y"][0] = 0.0, 0.0  # eps alone is in the roots
    given["h"][1] *= 1e15
    given["y"][1] *= 1e15
    given["h"][2] *= 1e-15
    given["y"][2] *= 1e-15
    given["h"][3] = 0.0
    given["y"][4] = 0.0
    given["y"][4, :, 5] = 3.0
    check(given)


def rows(given: Given, index: Tensor) -> Given:
    return {**given, **{name: given[name][index] for name in ("h", "y", "mix")}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_in_every_batch(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in another order and place of a tile, and among so many that programs go through several tiles;
    beside NaN too."""
    pytest.importorskip("triton")
    from weft.kernels.triton import hyper as kernels

    given = example(35, device, dim=40, parts=3, dtype=dtype)
    given["mixer"] = replace(given["mixer"], iterations=3)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_MANY", 1)
        patch.setattr(kernels, "_SHARERS", 2)
        patch.setattr(kernels, "_group", lambda tokens: 16)
        many = hyper_post_pre(**given)
    given["h"][7] = float("nan")
    some = torch.tensor([34, 2, 7, 17, 0, 33, 3, 32, 1, 4, 5, 6, 8, 9, 10, 11, 12, 18], device=device)
    for index in (some, some.flip(0), *(torch.tensor([i], device=device) for i in (0, 17, 34))):
        got = hyper_post_pre(**rows(given, index))
        keep = index != 7
        assert all(same_bits(a[keep], b[index][keep]) for a, b in zip(got, many, strict=True))
    few = hyper_post(**{name: rows(given, some)[name] for name in ("h", "y", "mix")})
    assert same_bits(few[some != 7], many[0][some][some != 7])


def _flat(shape: Any) -> Any:
    return shape[0] if isinstance(shape[0], tuple) else shape


def test_nothing_is_read_that_was_not_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = example(18, device, dim=72)
    given["mixer"] = replace(given["mixer"], iterations=2)
    want = hyper_post_pre(**given)
    full = torch.full
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: full(_flat(shape), float("nan"), **how))
    assert all(same_bits(a, b) for a, b in zip(hyper_post_pre(**given), want, strict=True))


def test_no_tokens(device: str) -> None:
    given = example(0, device, dim=64)
    assert [tuple(x.shape) for x in hyper_post_pre(**given)] == [(0, 4, 64), (0, 64), (0, 24)]
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)


def test_other_numbers_of_streams(device: str) -> None:
    """No kernel; the choice says so."""
    assert choose(2, "sm90", frozenset({"triton"})).implementation == "reference"
    fn, base = torch.randn(8, 64, device=device), torch.randn(8, device=device)
    mixer = Mixer(fn, base, torch.ones(3, device=device), 20, 1e-6, 1e-6)
    h = torch.randn(3, 2, 32, device=device)
    x, mix = hyper_pre(h, mixer, torch.ones(32, device=device))
    assert x.shape == (3, 32) and mix.shape == (3, 8)
