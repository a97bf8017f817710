"""Few cases in which every two values of two factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A covering array of strength 2, greedily: of some random cases the one with most new pairs comes next."""
    rng = random.Random(1)
    names = list(factors)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    cases = []
    while missing:
        (a, x), (b, y) = min(missing, key=str)
        tried = [{name: rng.choice(factors[name]) for name in names} | {a: x, b: y} for _ in range(50)]
        best = max(tried, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        cases.append(best)
    return cases


def _pairs(case: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))
