"""Whether counts come from given probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_Z = 3.0902  # of a normal distribution, one in a thousand lies beyond
_LEAST = 5.0  # expected in a cell; rarer ones are put together


def g_test(counts: Tensor, probability: Tensor) -> bool:
    """Whether a G-test at alpha 0.001 rejects that `counts` [n] were drawn with `probability` [n]."""
    counts, expected = counts.double(), probability.double() * counts.sum()
    if counts[probability == 0].any():
        return True
    rare = expected < _LEAST
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = 2 * float(torch.xlogy(counts, counts / expected).sum())
    degrees = len(counts) - 1
    spread = 2 / (9 * degrees)
    return statistic > degrees * (1 - spread + _Z * math.sqrt(spread)) ** 3  # Wilson and Hilferty
