"""Tokens from logits: masks, penalties, temperature, filters, noise; and the verification of drafts.

The semantics are those of `weft.runtime.decoding.sampler` and `rejection`: the noise of a row comes from its key
and the token ids alone, so that a token depends on the row's logits and settings and on nothing else. Scores over
the temperature are float32, weights and their sums float64, summed in an order that the row's width fixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable

# Columns that one program takes. The host sorts edits by it, so it is known here.
BLOCK = 2048
REJECTED = -1
# Drafts that a library judges.
JUDGED = 64


@dataclass(frozen=True)
class RowSettings:
    """How to draw from each of n rows; tensors on the device of the logits.

    temperature: [n] float32, 0: greedy, else at least 2^-126. top_k: [n] int32, below 1: off, else below V.
    top_p (1: off), min_p (0: off): [n] float64. keys: [n] int64 (`weft.runtime.decoding.noise.stream_key`). warm:
    [w] int32, the rows that are not greedy. filtered: [f] int32, those of them with a top_k or a top_p. counters:
    [n] int32 zeros, which are zeros again afterwards. nucleus: whether all warm rows have a top_p and no top_k.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    warm: Tensor
    filtered: Tensor
    counters: Tensor
    nucleus: bool = False

    @property
    def all_warm(self) -> bool:
        return len(self.warm) == len(self.temperature)


@dataclass(frozen=True)
class Masks:
    """What grammars allow. words: [g, ceil(V / 32)] int32, token v is bit v % 32 of word v // 32 (llguidance's
    layout). slots: [n] int32, the mask of each row, -1: none."""

    words: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Edits:
    """Changes of single scores: rows [e] int32 have any, slots [n] int32 says which of these a row is, or -1.

    tokens: [m] int32, row by row, ascending, none twice in a row; starts: [e, ceil(V / BLOCK) + 1] int32, where
    those of each block of columns begin. values: [m, 3] float32: x -> (x > 0 ? x / a : x * a) - b + c, rounded
    after each step; -inf if c is. left: [e] int32 zeros, written: whether anything finite and allowed is left; a
    row with a mask of which nothing is left is used without its edits.
    """

    rows: Tensor
    slots: Tensor
    starts: Tensor
    tokens: Tensor
    values: Tensor
    left: Tensor


@dataclass(frozen=True)
class Refused:
    """Rows to draw from what their distribution has more of than `odds`. odds: [r, V] float64; slots: [n] int32,
    -1: draw as usual."""

    odds: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Scores:
    """Rows as they are drawn from, but for temperature and filters. logits: [n, V] float32, rows may be strided;
    not modified."""

    logits: Tensor
    masks: Masks | None = None
    edits: Edits | None = None

    @property
    def width(self) -> int:
        return int(self.logits.shape[1])


def sample_rows(
    scores: Scores,
    settings: RowSettings,
    *,
    refused: Refused | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """One token of each row -> [n] int32; the lowest of equals.

    (score - best) / temperature, then top_k (ties at the cut: the lower ids), top_p (a token is dropped if those
    before it have at least top_p of what top_k kept), min_p (relative to the best), plus Gumbel noise, of float64.
    deterministic: False lets a library draw with noise of its own, which depends on a row's place in the batch.
    """
    nucleus = settings.nucleus and scores.edits is None and refused is None
    chosen = choose(arch(scores.logits), installed(), deterministic=deterministic, nucleus=nucleus)
    name = _checked(scores, settings, implementation or chosen.implementation)
    if refused is not None:
        check_tensor("odds", refused.odds, (None, scores.width), torch.float64)
        check_tensor("slots", refused.slots, (len(scores.logits),), torch.int32)
        check(refused.odds.is_contiguous(), "odds")
    if not len(scores.logits):
        return torch.empty(0, dtype=torch.int32, device=scores.logits.device)
    if name == "reference":
        from weft.kernels.reference import sampling as reference

        return reference.sample_rows(scores, settings, refused)
    if name == "flashinfer":
        from weft.kernels.libraries import flashinfer_sampling

        check(scores.edits is None and refused is None, "edits and refused drafts are not for FlashInfer")
        return flashinfer_sampling.draw(scores, settings)
    from weft.kernels.triton.sampling import sample_rows as launch

    return launch(scores, settings, refused)


def distribution_rows(scores: Scores, settings: RowSettings, *, implementation: str | None = None) -> Tensor:
    """[n, V] float64 probabilities that `sample_rows` draws from, but for `refused`."""
    name = _checked(scores, settings, implementation)
    if not len(scores.logits):
        return torch.empty(scores.logits.shape, dtype=torch.float64, device=scores.logits.device)
    if name == "reference":
        from weft.kernels.reference import sampling as reference

        return reference.distribution_rows(scores, settings)
    from weft.kernels.triton.sampling import distribution_rows as launch

    return launch(scores, settings)


def judge_rows(
    scores: Scores, settings: RowSettings, drafts: Tensor, odds: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Each draft that is accepted, or REJECTED -> [n] int32: one uniform number of the row's key is below the
    draft's probability over the odds that it was drafted with. drafts: [n] int32, odds: [n] float64.

    Source: Leviathan et al. (2023), Chen et al. (2023)."""
    rows = len(scores.logits)
    chosen = choose_judge(arch(scores.logits), installed(), rows, edited=scores.edits is not None)
    name = _checked(scores, settings, implementation or chosen.implementation)
    check_tensor("drafts", drafts, (rows,), torch.int32)
    check_tensor("odds", odds, (rows,), torch.float64)
    if not rows:
        return torch.empty_like(drafts)
    if name == "reference":
        from weft.kernels.reference import sampling as reference

        return reference.judge_rows(scores, settings, drafts, odds)
    if name == "flashinfer":
        from weft.kernels.libraries import flashinfer_sampling

        check(scores.edits is None, "edits are not for FlashInfer")
        return flashinfer_sampling.judge(scores, settings, drafts, odds)
    from weft.kernels.triton.sampling import judge_rows as launch

    return launch(scores, settings, drafts, odds)


def draft_matches(drawn: Tensor, drafts: Tensor, starts: Tensor, *, implementation: str | None = None) -> Tensor:
    """How many of each chain's first drafts were drawn -> [B] int32. drawn, drafts: [R] int32, chain after chain;
    starts: [B + 1] int32."""
    check_tensor("drawn", drawn, (None,), torch.int32)
    check_tensor("drafts", drafts, (len(drawn),), torch.int32)
    check_tensor("starts", starts, (None,), torch.int32)
    check(len(starts) > 0, "starts")
    if len(starts) == 1:
        return starts.new_empty(0)
    if (implementation or choose(arch(drawn), installed()).implementation) == "reference":
        from weft.kernels.reference import sampling as reference

        return reference.draft_matches(drawn, drafts, starts)
    from weft.kernels.triton.sampling_adjust import draft_matches as launch

    return launch(drawn, drafts, starts)


def apply_bitmask(logits: Tensor, masks: Masks, *, implementation: str | None = None) -> None:
    """-inf where a row's mask allows nothing, in place; for libraries that take logits and no masks."""
    _check_scores(Scores(logits, masks))
    if not logits.numel():
        return
    if (implementation or choose(arch(logits), installed()).implementation) == "reference":
        from weft.kernels.reference import sampling as reference

        reference.apply_bitmask(logits, masks)
        return
    from weft.kernels.triton.sampling_adjust import apply_bitmask as launch

    launch(logits, masks)


def _checked(scores: Scores, settings: RowSettings, implementation: str | None) -> str:
    """What runs."""
    _check_scores(scores)
    rows = len(scores.logits)
    for name, kind in (("temperature", torch.float32), ("top_k", torch.int32), ("counters", torch.int32)):
        check_tensor(name, getattr(settings, name), (rows,), kind)
    for name, kind in (("top_p", torch.float64), ("min_p", torch.float64), ("keys", torch.int64)):
        check_tensor(name, getattr(settings, name), (rows,), kind)
    check_tensor("warm", settings.warm, (None,), torch.int32)
    check_tensor("filtered", settings.filtered, (None,), torch.int32)
    return implementation or choose(arch(scores.logits), installed()).implementation


def _check_scores(scores: Scores) -> None:
    check_tensor("logits", scores.logits, (None, None), torch.float32)
    rows, width = scores.logits.shape
    check(width > 0, "logits")
    if scores.masks is not None:
        check_tensor("words", scores.masks.words, (None, -(-width // 32)), torch.int32)
        check_tensor("slots", scores.masks.slots, (rows,), torch.int32)
        check(scores.masks.words.is_contiguous(), "words")
    if scores.edits is not None:
        edits = scores.edits
        check_tensor("rows", edits.rows, (None,), torch.int32)
        check_tensor("slots", edits.slots, (rows,), torch.int32)
        check_tensor("starts", edits.starts, (len(edits.rows), -(-width // BLOCK) + 1), torch.int32)
        check_tensor("tokens", edits.tokens, (None,), torch.int32)
        check_tensor("values", edits.values, (len(edits.tokens), 3), torch.float32)
        check_tensor("left", edits.left, (len(edits.rows),), torch.int32)


def choose(arch: Arch, libraries: frozenset[str], *, deterministic: bool = True, nucleus: bool = False) -> Choice:
    """nucleus: every row that is not greedy is cut by top_p alone, and none has edits or a refused draft. That is
    where FlashInfer was quicker on an H200: 0.5 to 0.6 of our time; of the others we take 0.2 to 0.9 of its."""
    if nucleus and not deterministic and _has_flashinfer(arch, libraries):
        return Choice("sample_rows", "flashinfer", "fast mode, top_p alone: noise by a row's place in the batch")
    return portable("sample_rows", arch, libraries)


def choose_judge(arch: Arch, libraries: frozenset[str], rows: int, *, edited: bool = False) -> Choice:
    """Only fast mode judges. FlashInfer's chains took 0.8 of our time up to JUDGED rows, 1.2 at 256 (H200)."""
    if rows <= JUDGED and not edited and _has_flashinfer(arch, libraries):
        return Choice("judge_rows", "flashinfer", f"chain verification of {JUDGED} drafts or fewer")
    return portable("judge_rows", arch, libraries)


def _has_flashinfer(arch: Arch, libraries: frozenset[str]) -> bool:
    return arch not in ("cpu", "interpreter") and "flashinfer.sampling" in libraries


def least_bytes(rows: int, width: int, *, warm: int = 0, filtered: int = 0) -> int:
    """Logits read once for the best of each row; once more for the noise, which is added to differences to the
    best; and twice for a cut, whose bound is found among what is near it. Settings, keys and tokens."""
    return 4 * width * (rows + warm + 2 * filtered) + rows * (4 + 4 + 8 + 8 + 8 + 4)


OP = Op(
    "sample_rows",
    "penalties, masks, temperature, top-k, top-p, min-p and Gumbel noise: a token of each row; drafts verified",
    ("reference", "triton", "flashinfer"),
    (
        Example("any shape", choose),
        Example("fast mode, top_p", partial(choose, deterministic=False, nucleus=True)),
        Example("fast mode, 32 drafts", partial(choose_judge, rows=32)),
    ),
)
