"""Brute force in float64 for `kernels.gpu.indexer`, and inputs of V4-Flash's sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged, Pages
from weft.kernels.gpu.indexer import GatheredKeys, IndexQuery
from weft.kernels.layouts import RowLayout, keys_fp8

_E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)


def rotated(q: Tensor, cos_sin: Tensor, hadamard: bool) -> Tensor:
    """q [T, n, dI] after RoPE and the Hadamard rotation, float64."""
    rope = cos_sin.shape[1]
    out = q.double()
    start = q.shape[2] - rope
    pairs = torch.view_as_complex(out[..., start:].unflatten(2, (-1, 2)).contiguous())
    angles = torch.complex(*cos_sin.double().chunk(2, dim=1))
    out = torch.cat((out[..., :start], torch.view_as_real(pairs * angles[:, None]).flatten(2)), 2)
    return out @ _hadamard(q.shape[2]).to(q.device) if hadamard else out


def _hadamard(size: int) -> Tensor:
    """Entry (i, j) is the sign of the parity of i & j, over sqrt(size)."""
    both = torch.arange(size)[:, None] & torch.arange(size)
    parity = torch.zeros_like(both)
    while bool(both.any()):
        parity ^= both & 1
        both >>= 1
    signs: Tensor = 1.0 - 2.0 * parity.double()
    return signs / math.sqrt(size)


def query(q: Tensor, weights: Tensor, cos_sin: Tensor, hadamard: bool, factor: float, out: IndexQuery) -> None:
    """`index_query`."""
    weights = weights.float() * factor
    x = rotated(q, cos_sin, hadamard)
    if out.scales is None:
        scale = (x.abs().amax(2).clamp_min(1e-4) / 448.0).float()
        out.codes.copy_((x / scale[..., None]).float().to(torch.float8_e4m3fn))
        out.weights.copy_(weights * scale)
        return
    quantise_e2m1(x, out.codes, out.scales)
    out.weights.copy_(weights)


def quantise_e2m1(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """x [..., d] float64 -> packed codes [..., d / 2] and biased exponents [..., groups]."""
    grouped = x.float().double().unflatten(-1, (scales.shape[-1], -1))
    ratio = grouped.abs().amax(-1).clamp_min(6.0 * 2.0**-126) / 6.0
    mantissa, exponent = torch.frexp(ratio.float())
    exponent = exponent - (mantissa == 0.5).int()
    value = (grouped / 2.0 ** exponent.double()[..., None]).flatten(-2)
    scales.copy_(exponent + 127)
    distance = (value.abs()[..., None] - _E2M1.to(x.device)).abs()
    nearest = distance.amin(-1, keepdim=True)
    # Of two values equally near the one with the even code.
    cost = torch.where(distance == nearest, torch.arange(8, device=x.device) % 2, 2)
    code = cost.argmin(-1) | (torch.signbit(value).long() << 3)
    codes.copy_(code[..., 0::2] | (code[..., 1::2] << 4))


def e4m3_values(codes: Tensor) -> Tensor:
    """e4m3 codes of either dtype -> float64."""
    return codes.view(torch.float8_e4m3fn).double()


def e2m1_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Packed [..., d / 2] and biased exponents [..., groups] -> [..., d] float64."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    value = _E2M1.to(codes.device)[pairs & 7] * torch.where(pairs > 7, -1.0, 1.0)
    factor = torch.exp2(scales.double() - 127.0)
    grouped: Tensor = value.unflatten(-1, (scales.shape[-1], -1)) * factor[..., None]
    return grouped.flatten(-2)


def query_values(query: IndexQuery) -> Tensor:
    """[T, n, dI] float64, without the scale that is folded into the weights."""
    return e4m3_values(query.codes) if query.scales is None else e2m1_values(query.codes, query.scales)


def key_values(keys: GatheredKeys) -> Tensor:
    """[K, dI] float64."""
    if keys.scales.dtype == torch.float32:
        return e4m3_values(keys.codes) * keys.scales.double()[:, None]
    return e2m1_values(keys.codes, keys.scales)


def read_keys(keys: Paged, rows: Tensor) -> GatheredKeys:
    """Pool rows [K]."""
    layout = keys.layout
    page, place = rows.long() // layout.page, rows.long() % layout.page
    data = keys.bytes[:, : layout.scales_at].unflatten(1, (layout.page, layout.data_bytes))
    end = layout.scales_at + layout.page * layout.scale_bytes
    scales = keys.bytes[:, layout.scales_at : end].unflatten(1, (layout.page, layout.scale_bytes))
    codes, scale = data[page, place], scales[page, place]
    if layout.codes == "e4m3":
        return GatheredKeys(codes.view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32)[:, 0])
    return GatheredKeys(codes, scale)


def _rows(table: Tensor, count: int, page: int) -> Tensor:
    entry = torch.arange(count, device=table.device)
    return table.long()[entry // page] * page + entry % page


def _scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """q [n, dI], weights [n], keys [C, dI] -> [C]."""
    return (weights.double()[:, None] * (q @ keys.T).clamp_min(0.0)).sum(0)


def paged(query: IndexQuery, keys: Paged, tables: Tensor, sequence: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits`."""
    out.fill_(float("-inf"))
    q = query_values(query)
    for token, count in enumerate(visible.tolist()):
        rows = _rows(tables[int(sequence[token])], count, keys.layout.page)
        values = key_values(read_keys(keys, rows))
        out[token, :count] = _scores(q[token], query.weights[token], values).float()


def ragged(query: IndexQuery, keys: GatheredKeys, start: Tensor, visible: Tensor, out: Tensor) -> None:
    """`index_logits_ragged`."""
    out.fill_(float("-inf"))
    q = query_values(query)
    for token, (first, count) in enumerate(zip(start.tolist(), visible.tolist(), strict=True)):
        seen = GatheredKeys(keys.codes[first : first + count], keys.scales[first : first + count])
        out[token, :count] = _scores(q[token], query.weights[token], key_values(seen)).float()


def gather(keys: Paged, tables: Tensor, counts: Tensor, starts: Tensor, out: GatheredKeys) -> None:
    """`gather_keys`."""
    for number, (count, start) in enumerate(zip(counts.tolist(), starts.tolist(), strict=True)):
        found = read_keys(keys, _rows(tables[number], count, keys.layout.page))
        out.codes[start : start + count] = found.codes
        out.scales[start : start + count] = found.scales


def store_keys(values: Tensor, layout: RowLayout, pool: Tensor, rows: Tensor) -> None:
    """Quantise values [K, dI] into pool rows [K], in plain torch."""
    page, place = rows.long() // layout.page, rows.long() % layout.page
    data = pool[:, : layout.scales_at].unflatten(1, (layout.page, layout.data_bytes))
    end = layout.scales_at + layout.page * layout.scale_bytes
    scales = pool[:, layout.scales_at : end].unflatten(1, (layout.page, layout.scale_bytes))
    if layout.codes == "e4m3":
        scale = (values.double().abs().amax(1, keepdim=True).clamp_min(layout.least) / 448.0).float()
        data[page, place] = (values.double() / scale).float().to(torch.float8_e4m3fn).view(torch.uint8)
        scales[page, place] = scale.view(torch.uint8)
        return
    codes = torch.empty(len(values), layout.coded_bytes, dtype=torch.uint8, device=values.device)
    exponents = torch.empty(len(values), layout.groups, dtype=torch.uint8, device=values.device)
    quantise_e2m1(values.double(), codes, exponents)
    data[page, place], scales[page, place] = codes, exponents


@dataclass(frozen=True)
class IndexerExample:
    """Arguments of `index_query`, and of `index_logits` with its result."""

    q: Tensor
    weights: Tensor
    cos_sin: Tensor
    keys: Pages
    tables: Tensor
    sequence: Tensor
    visible: Tensor
    width: int


def example(
    sequences: int,
    entries: int,
    *,
    rows: int = 1,
    heads: int = 64,
    dim: int = 128,
    rope: int = 64,
    layout: RowLayout | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> IndexerExample:
    """V4-Flash: `rows` tokens of each sequence, seeing `entries` keys or, the earlier ones, one key less per 4.

    Pages of a sequence are scattered over the pool. rows=1 is decode, rows=entries * 4 a whole prefill.
    """
    layout = layout or keys_fp8(64, dim)
    generator = torch.Generator(device=device).manual_seed(seed)
    pages = -(-entries // layout.page)
    tokens = sequences * rows
    pool = Pages.empty(1 + sequences * pages, layout, device)
    order = 1 + torch.randperm(sequences * pages, generator=generator, device=device)
    tables = order.to(torch.int32).view(sequences, pages)
    for table in tables:
        values = torch.randn(entries, dim, generator=generator, device=device)
        store_keys(values, layout, pool.bytes, _rows(table, entries, layout.page))
    position = torch.arange(rows, device=device).repeat(sequences)
    visible = (entries - (rows - 1 - position) // 4).clamp_min(0).to(torch.int32)
    angle = position.float()[:, None] * 0.5 ** torch.arange(rope // 2, device=device)
    weights = torch.randn(tokens, heads, generator=generator, device=device) * (heads * dim) ** -0.5
    return IndexerExample(
        torch.randn(tokens, heads, dim, generator=generator, device=device).bfloat16(),
        weights,
        torch.cat((angle.cos(), angle.sin()), 1),
        pool,
        tables,
        torch.arange(sequences, device=device, dtype=torch.int32).repeat_interleave(rows),
        visible,
        pages * layout.page,
    )
