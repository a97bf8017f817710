"""Norm and RoPE of queries, norm, RoPE, rounding and store of the KV row, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.kernels import assert_within, in_wider_rows, same_bits
from support.norms import normed_and_turned, stored_bound
from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.heads import least_bytes, norm_rope_store
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.layouts import RowLayout, kv_fp4_v41, kv_fp8, kv_fp8_v41
from weft.kernels.reference.heads import angles, example
from weft.kernels.reference.rows import gather

TINY = kv_fp8(8, 48, 16)


def arguments(
    tokens: int,
    device: str,
    *,
    heads: int = 5,
    layout: RowLayout = TINY,
    rope: int = 16,
    dtype: Any = torch.bfloat16,
) -> dict[str, Any]:
    """q and kv are slices of wider rows, as fused projections make them."""
    dim = layout.channels
    wide = torch.randn(tokens, dim + 24, device=device).to(dtype)
    wider = (torch.randn(tokens, 8 + heads * dim + 40, device=device) * 3).to(dtype)
    order = torch.randperm(3 * layout.page)[:tokens].int() + 1
    return {
        "q": wider[:, 8 : 8 + heads * dim].unflatten(1, (heads, dim)),
        "kv": wide[:, 24:],
        "kv_weight": torch.randn(dim, device=device),
        "cos_sin": angles(torch.randint(0, 9999, (tokens,), device=device), rope),
        "rows": order.to(device),
        "pool": Pages.empty(4, layout, device),
        "eps": 1e-6,
    }


def check(given: dict[str, Any], **how: Any) -> None:
    q, kv, pool = given["q"], given["kv"], given["pool"]
    out = norm_rope_store(**given, **how)
    assert out.dtype == q.dtype and out.shape == q.shape
    zero = torch.zeros((), dtype=torch.float64, device=q.device)
    want, bound = normed_and_turned(q.double(), zero.expand(q.shape), None, given["cos_sin"], given["eps"])
    # bfloat16 keeps 7 bits behind the leading one: half a step is at most 2^-8.
    rounding = 2.0**-8 if q.dtype == torch.bfloat16 else 2.0**-24
    assert_within(out.double(), want, bound + rounding * (want.abs() + bound))
    want, bound = normed_and_turned(
        kv.double(), zero.expand(kv.shape), given["kv_weight"], given["cos_sin"], given["eps"]
    )
    stored = given["rows"] >= 0
    got = gather(pool, given["rows"])[stored]
    assert_within(got, want[stored], stored_bound(want, bound, pool.layout)[stored])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7])
def test_small(implementation: str, dtype: torch.dtype, tokens: int, device: str) -> None:
    check(arguments(tokens, device, dtype=dtype), implementation=implementation)


@pytest.mark.parametrize(
    ("layout", "rope", "heads"),
    [
        (kv_fp8_v41(4, 96), 16, 4),
        (kv_fp4_v41(2, 80), 8, 1),
        (kv_fp8(4, 40, 8), 8, 8),
        (RowLayout(4, 16, 48, group=16), 64, 3),
    ],
)
def test_odd_sizes_and_other_layouts(layout: RowLayout, rope: int, heads: int, device: str) -> None:
    check(arguments(5, device, heads=heads, layout=layout, rope=rope, dtype=torch.float32))


def test_at_the_models_sizes(device: str) -> None:
    check(example(3, device))
    check(example(2, device, heads=128))


def test_extremes(device: str) -> None:
    given = arguments(6, device, dtype=torch.float32)
    given["q"][0], given["kv"][0] = 0.0, 0.0  # eps alone is in the root
    given["q"][1] *= 1e17
    given["kv"][1] *= 1e17
    given["q"][2] *= 1e-20
    given["kv"][2] *= 1e-20
    given["kv"][3] = 0.0
    given["kv"][3, 5] = 3.0  # one channel has all of it
    check(given)


def test_rows_that_are_none_and_bytes_that_are_not_its_own(device: str) -> None:
    given = arguments(6, device)
    given["rows"][1] = given["rows"][4] = -1
    pool = given["pool"]
    pool.bytes.fill_(255)
    check(given)
    other = torch.ones(4 * TINY.page, dtype=torch.bool)
    other[given["rows"][given["rows"] >= 0].long().cpu()] = False
    data = pool.bytes[:, : TINY.scales_at].unflatten(1, (TINY.page, -1)).flatten(0, 1)
    assert (data.cpu()[other] == 255).all()


def test_no_tokens(device: str) -> None:
    given = arguments(0, device)
    assert norm_rope_store(**given).shape == (0, 5, 64)
    assert not given["pool"].bytes.any()


def test_a_row_has_the_same_bits_in_every_batch(device: str) -> None:
    """At the model's width: alone, among others, and in another order."""
    given = example(6, device, heads=6)
    together = norm_rope_store(**given)
    stored = given["pool"].bytes.clone()
    order = torch.randperm(6, device=device)
    for rows in (order, *(torch.tensor([i], device=device) for i in range(6))):
        part = {name: given[name][rows] for name in ("q", "kv", "cos_sin", "rows")}
        fresh = Pages.empty(len(stored), given["pool"].layout, device)
        assert same_bits(norm_rope_store(**{**given, **part, "pool": fresh}), together[rows])
        assert torch.equal(gather(fresh, part["rows"]), gather(Pages(stored, fresh.layout), part["rows"]))
        given["pool"].bytes.copy_(fresh.bytes) if len(rows) == 6 else None
    assert torch.equal(given["pool"].bytes, stored)


def test_columns_of_wider_rows_are_the_same_queries(device: str) -> None:
    given = example(3, device, heads=6)
    whole = norm_rope_store(**given)
    for at in (0, 16, 3):
        q, kv = (in_wider_rows(given[name].flatten(1), at, 48 - at) for name in ("q", "kv"))
        fresh = Pages.empty(len(given["pool"].bytes), given["pool"].layout, device)
        out = norm_rope_store(**{**given, "q": q.unflatten(1, (6, 512)), "kv": kv, "pool": fresh})
        assert same_bits(out, whole) and torch.equal(fresh.bytes, given["pool"].bytes)


def test_bytes_moved(device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example(2, device)
    with traffic() as moved:
        norm_rope_store(**given, implementation="triton")
    assert moved.total <= 1.3 * least_bytes(2, 64, 512, 64, 2, given["pool"])
