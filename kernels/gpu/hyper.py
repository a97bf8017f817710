"""Manifold-constrained hyper-connections: what stands between one sublayer and the next.

A token has hc residual streams of D channels. A mixer reads them all and gives `pre` (how a sublayer's input is
gathered from them), `post` (how its output is spread over them) and `comb`, a doubly stochastic matrix that mixes
them. These lie in one row of (2 + hc) * hc floats, comb row by row; it travels from the launch that makes it to
the one that spreads the sublayer's output.

Source: DeepSeek-V4's published inference code; all in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.reference import heads
from weft.kernels.reference import hyper as reference

# The kernels are written out for so many streams, which is what V4 has.
STREAMS = 4
# Of a sublayer's output, at most: what a program holds while it waits for more.
PARTS = 8
_FLOATS = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Mixer:
    """fn: [(2 + hc) * hc, hc * D], base: [(2 + hc) * hc], scale: [3] (of pre, post, comb), float32, contiguous."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    iterations: int
    hc_eps: float
    norm_eps: float


@dataclass(frozen=True)
class HeadMixer:
    """The readout's: fn [hc, hc * D], base [hc], scale [1], float32, contiguous; it only gathers."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    hc_eps: float
    norm_eps: float


def hyper_pre(
    h: Tensor, mixer: Mixer, norm: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The input of the first sublayer, in two launches.

    h: [T, hc, D] bfloat16 or float32, contiguous. norm: [D] float32, the sublayer's norm. Returns the gathered and
    normalised streams, [T, D] like h, and the mix, [T, (2 + hc) * hc] float32: pre, post, comb [j, k].
    """
    tokens, streams, dim = _check_streams(h)
    _check_mixer(mixer, (2 + streams) * streams, 3, h, norm)
    x = torch.empty(tokens, dim, dtype=h.dtype, device=h.device)
    mix = torch.empty(tokens, (2 + streams) * streams, dtype=torch.float32, device=h.device)
    if tokens == 0:
        return x, mix
    if _is_reference(h, implementation):
        return _reference_pre(h, mixer, norm, x, mix)
    if implementation == "flashinfer":
        return _library_pre(h, mixer, norm)
    from weft.kernels.triton.hyper import hyper_pre as launch

    launch(h, mixer, norm, x, mix)
    return x, mix


def hyper_post_pre(
    h: Tensor, y: Tensor, mix: Tensor, mixer: Mixer, norm: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A sublayer's output spread over the streams, and the input of the next sublayer, in two launches.

    h: [T, hc, D] bfloat16 or float32, contiguous. y: [T, P, D] bfloat16 or float32, contiguous: parts of the
    output, added left to right in float32 and rounded as h is stored (one from attention; one per expert of a
    token). mix: of `hyper_pre` or this. Returns the new streams (a new tensor like h): post_k * y + sum over j of
    comb[j, k] * h_j, rounded, and x and mix of `hyper_pre` of those."""
    tokens, streams, dim = _check_streams(h)
    _check_post(h, y, mix)
    _check_mixer(mixer, (2 + streams) * streams, 3, h, norm)
    out = torch.empty_like(h)
    x = torch.empty(tokens, dim, dtype=h.dtype, device=h.device)
    new = torch.empty_like(mix)
    if tokens == 0:
        return out, x, new
    if _is_reference(h, implementation):
        out.copy_(reference.post(h, y, mix))
        return out, *_reference_pre(out, mixer, norm, x, new)
    if implementation == "flashinfer":
        out = hyper_post(h, y, mix, implementation=implementation)
        return out, *_library_pre(out, mixer, norm)
    from weft.kernels.triton.hyper import hyper_post_pre as launch

    launch(h, y, mix, mixer, norm, out, x, new)
    return out, x, new


def hyper_post(h: Tensor, y: Tensor, mix: Tensor, *, implementation: str | None = None) -> Tensor:
    """The new streams of `hyper_post_pre` alone, in one launch, with the same bits."""
    _check_streams(h)
    _check_post(h, y, mix)
    out = torch.empty_like(h)
    if len(h) == 0:
        return out
    if _is_reference(h, implementation):
        return out.copy_(reference.post(h, y, mix))
    if implementation == "flashinfer":
        from weft.kernels.libraries import flashinfer_hyper

        return flashinfer_hyper.post(h, y, mix)
    from weft.kernels.triton.hyper import hyper_post as launch

    launch(h, y, mix, out)
    return out


def hyper_head(h: Tensor, mixer: HeadMixer, norm: Tensor, *, implementation: str | None = None) -> Tensor:
    """The readout's input: streams gathered and normalised, [T, hc, D] -> [T, D] like h, in two launches."""
    tokens, streams, dim = _check_streams(h)
    _check_mixer(mixer, streams, 1, h, norm)
    x = torch.empty(tokens, dim, dtype=h.dtype, device=h.device)
    if tokens == 0:
        return x
    if _is_reference(h, implementation):
        parameters = mixer.fn, mixer.base, mixer.scale, norm, mixer.hc_eps, mixer.norm_eps
        return x.copy_(reference.head(h, *parameters))
    from weft.kernels.triton.hyper import hyper_head as launch

    launch(h, mixer, norm, x)
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, implementation: str | None = None) -> Tensor:
    """x [T, D] bfloat16 or float32 (rows may be strided) / sqrt(mean(x^2) + eps) * weight [D] float32 -> [T, D]
    like x, in one launch."""
    check_tensor("x", x, (None, None), *_FLOATS)
    check_tensor("weight", weight, (x.shape[1],), torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return out
    if _is_reference(x, implementation):
        return out.copy_(heads.rms_norm(x.double(), weight, eps))
    from weft.kernels.triton.hyper import rms_norm as launch

    launch(x, weight, eps, out)
    return out


def _check_streams(h: Tensor) -> tuple[int, int, int]:
    check_tensor("h", h, (None, None, None), *_FLOATS)
    check(h.is_contiguous(), "h is contiguous")
    return h.shape[0], h.shape[1], h.shape[2]


def _check_post(h: Tensor, y: Tensor, mix: Tensor) -> None:
    tokens, streams, dim = h.shape
    check_tensor("y", y, (tokens, None, dim), *_FLOATS)
    check_tensor("mix", mix, (tokens, (2 + streams) * streams), torch.float32)
    check(y.is_contiguous() and mix.is_contiguous(), "y and mix are contiguous")
    check(0 < y.shape[1] <= PARTS, "parts", y.shape)


def _check_mixer(mixer: Mixer | HeadMixer, rows: int, scales: int, h: Tensor, norm: Tensor) -> None:
    check_tensor("fn", mixer.fn, (rows, h.shape[1] * h.shape[2]), torch.float32)
    check_tensor("base", mixer.base, (rows,), torch.float32)
    check_tensor("scale", mixer.scale, (scales,), torch.float32)
    check_tensor("norm", norm, (h.shape[2],), torch.float32)
    check(mixer.fn.is_contiguous(), "fn is contiguous")


def _is_reference(x: Tensor, implementation: str | None) -> bool:
    streams = x.shape[1] if x.dim() == 3 else STREAMS
    return (implementation or choose(streams, arch(x), installed()).implementation) == "reference"


def _reference_pre(h: Tensor, mixer: Mixer, norm: Tensor, x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    parameters = mixer.fn, mixer.base, mixer.scale, norm, mixer.iterations, mixer.hc_eps, mixer.norm_eps
    gathered, gates = reference.pre(h, *parameters)
    return x.copy_(gathered), mix.copy_(gates)


def _library_pre(h: Tensor, mixer: Mixer, norm: Tensor) -> tuple[Tensor, Tensor]:
    """FlashInfer's kernel behind PyTorch's product, and our norm: five launches. Of the mix, pre is left out."""
    from weft.kernels.libraries import flashinfer_hyper

    gathered, mix = flashinfer_hyper.pre(h, mixer)
    return rms_norm(gathered, norm, mixer.norm_eps), mix


def choose(streams: int, arch: Arch, libraries: frozenset[str]) -> Choice:
    """FlashInfer's is only named, as benchmarks do: it passes over the streams more often, in more launches."""
    if streams != STREAMS:
        return Choice("hyper", "reference", f"the kernels have {STREAMS} streams")
    return portable("hyper", arch, libraries)


def least_bytes(tokens: int, dim: int, parts: int, itemsize: int, streams: int = STREAMS) -> int:
    """Of `hyper_post_pre`: streams, parts and mix read, fn and the norm read once; streams, input and mix written.
    The new streams are read once more: how they are gathered is known only when all of them are."""
    rows = (2 + streams) * streams
    activations = dim * itemsize * (3 * streams + parts + 1) + 8 * rows
    return tokens * activations + 4 * (rows * (streams * dim + 1) + 3 + dim)


OP = Op(
    "hyper",
    "a sublayer's output spread over the residual streams, and the next one's input gathered and normalised",
    ("reference", "triton", "flashinfer"),
    (Example("four streams", lambda arch, libraries: choose(STREAMS, arch, libraries)),),
)
