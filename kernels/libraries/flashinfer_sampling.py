"""FlashInfer's sampling, for fast mode: filters without a sort, and the verification of drafted chains.

Four promises of `weft.runtime.decoding` are not kept, so deterministic engines never take it:

- its noise is Philox, started from a row's key and the row's place in the batch, so a token depends on that place;
- tokens that are equally likely as the last one that top_k or top_p keeps may all be kept;
- probabilities are float32;
- a verified chain's replacement of a refused draft comes from the same call as the refusal.

What is kept is the distribution, but for these ties and roundings. Source: signatures, docstrings and kernels of
flashinfer-python 0.7.2.post1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.gpu.base import check, check_tensor
from weft.kernels.gpu.sampling import REJECTED, RowSettings, Scores, apply_bitmask
from weft.kernels.libraries.flashinfer import require

# The least normal float32: over a lower temperature, 1 / temperature would be infinite.
_COLDEST = 2.0**-126
_LEAST_MIN_P = 2.0**-100


class Verified(NamedTuple):
    """tokens: [B, n + 1] int32: the drafts that are kept, one more token, -1. kept: [B] int32."""

    tokens: Tensor
    kept: Tensor


def draw(scores: Scores, settings: RowSettings) -> Tensor:
    """As `weft.kernels.gpu.sampling.sample_rows`, of rows without edits."""
    filters = _filters(settings)
    greedy = not settings.all_warm
    return sample_rows(_masked(scores), settings.temperature, settings.keys, **filters, greedy=greedy)


def judge(scores: Scores, settings: RowSettings, drafts: Tensor, odds: Tensor) -> Tensor:
    """As `weft.kernels.gpu.sampling.judge_rows`, of rows without edits: each draft is a chain of its own."""
    model = distribution(_masked(scores), settings.temperature, **_filters(settings))
    drafted = torch.zeros_like(model).scatter_(1, drafts[:, None].long(), odds[:, None].float())
    chains = torch.stack((model, model), 1)
    kept = verify_chain(drafts[:, None], drafted[:, None], chains, settings.keys).kept
    return torch.where(kept > 0, drafts, REJECTED)


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    keys: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    greedy: bool = True,
) -> Tensor:
    """One token of each row: [n] int32.

    logits: [n, V] float32 after penalties and masks. temperature: [n] float32, 0 for the best token, the lowest id
    of equals. keys: [n] int64 of each row's noise. top_k: [n] int32, below 1: all; top_p, min_p: [n] float32; each
    None where no row has it. greedy: whether a temperature may be 0.
    """
    require("sampling")
    from flashinfer import sampling

    if len(logits) == 0:
        return torch.empty(0, dtype=torch.int32, device=logits.device)
    check_tensor("keys", keys, (len(logits),), torch.int64)
    noise = {"seed": keys, "offset": _zero(keys.device)}
    probs = _probabilities(logits, temperature, top_k)
    if min_p is not None:
        if top_p is not None:
            probs = sampling.top_p_renorm_probs(probs, top_p)
        # With 0, a token that is masked would count as kept, and be what rounding at the end of the sum leads to.
        drawn: Tensor = sampling.min_p_sampling_from_probs(probs, min_p.clamp_min(_LEAST_MIN_P), **noise)
    elif top_p is not None:
        drawn = sampling.top_p_sampling_from_probs(probs, top_p, **noise)
    else:
        drawn = sampling.sampling_from_probs(probs, **noise)
    if not greedy:
        return drawn
    return torch.where(temperature > 0, drawn, logits.argmax(1).int())


def distribution(
    logits: Tensor,
    temperature: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """[n, V] float32 probabilities that `sample_rows` draws from, for `verify_chain`. Rows of temperature 0 have
    one token, or several that are equally good."""
    require("sampling")
    from flashinfer import sampling

    probs = _probabilities(logits, temperature, top_k)
    if top_p is not None:
        probs = sampling.top_p_renorm_probs(probs, top_p)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(1, keepdim=True), 0)
        probs /= probs.sum(1, keepdim=True)
    return probs


def verify_chain(drafts: Tensor, odds: Tensor, probabilities: Tensor, keys: Tensor) -> Verified:
    """Speculative sampling with rejection of a chain of drafts: what is returned has the model's distribution.

    drafts: [B, n] int32; chains of other lengths go in other calls. odds: [B, n, V] float32 that they were drawn
    with, 1 at the token of one that was certain. probabilities: [B, n + 1, V] float32 of the model. keys: [B]
    int64. Source: Leviathan et al. (2023), Chen et al. (2023).
    """
    require("sampling")
    from flashinfer import sampling

    check_tensor("drafts", drafts, (None, None), torch.int32)
    chains, count = drafts.shape
    check_tensor("odds", odds, (chains, count, None), torch.float32)
    check_tensor("probabilities", probabilities, (chains, count + 1, odds.shape[2]), torch.float32)
    check_tensor("keys", keys, (chains,), torch.int64)
    check(all(x.is_contiguous() for x in (drafts, odds, probabilities)), "tensors are contiguous")
    if chains == 0:
        return Verified(drafts.new_empty(0, count + 1), drafts.new_empty(0))
    tokens, _, kept = sampling.chain_speculative_sampling(
        odds, drafts, probabilities, seed=keys, offset=_zero(keys.device)
    )
    return Verified(tokens, kept)


def _masked(scores: Scores) -> Tensor:
    if scores.masks is None:
        return scores.logits
    logits = scores.logits.clone(memory_format=torch.contiguous_format)
    apply_bitmask(logits, scores.masks)
    return logits


def _filters(settings: RowSettings) -> dict[str, Tensor | None]:
    """min_p is known on the device only, so it is always one."""
    cut = len(settings.filtered) > 0
    return {
        "top_k": settings.top_k if cut else None,
        "top_p": settings.top_p.float() if cut else None,
        "min_p": settings.min_p.float(),
    }


def _probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor | None) -> Tensor:
    """After temperature and top_k, [n, V] float32."""
    from flashinfer import sampling

    check_tensor("logits", logits, (None, None), torch.float32)
    rows, vocabulary = logits.shape
    check_tensor("temperature", temperature, (rows,), torch.float32)
    # Differences to the best, so that dividing by next to nothing leaves it at 0 and the others at -inf.
    best = logits.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    probs: Tensor = sampling.softmax(logits - best, temperature.clamp_min(_COLDEST))
    if top_k is not None:
        check_tensor("top_k", top_k, (rows,), torch.int32)
        probs = sampling.top_k_renorm_probs(probs, torch.where(top_k > 0, top_k, vocabulary))
    return probs


@cache
def _zero(device: torch.device) -> Tensor:
    """Where each row's noise begins: a key serves one call."""
    return torch.zeros(1, dtype=torch.int64, device=device)
