"""The compressors by their definition, in float64, one entry at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.kernels.gpu.base import Paged, Pages
from weft.kernels.layouts import keys_fp4, keys_fp8, kv_fp8
from weft.kernels.reference.heads import angles, rms_norm, rotate
from weft.kernels.reference.rows import store

if TYPE_CHECKING:
    from weft.kernels.gpu.compress import C4Plan, C128Plan


def compress_c4(
    rows: Tensor,
    ape: Tensor,
    tail: Tensor,
    norm: Tensor,
    key_norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C4Plan,
    pool: Paged,
    keys: Paged,
    eps: float,
    *,
    hadamard: bool,
) -> None:
    """See `weft.kernels.gpu.compress.compress_c4`."""
    entries, keyed = pooled_c4(rows, ape, tail, norm.numel(), plan)
    _update_tail(rows, ape, tail, plan)
    entries = rotate(rms_norm(entries, norm, eps), cos_sin_entries)
    keyed = rotate(rms_norm(keyed, key_norm, eps), cos_sin_entries)
    if hadamard:
        keyed = keyed @ sylvester(key_norm.numel(), keyed.device)
    nowhere = plan.sequence < 0
    store(pool, plan.target.masked_fill(nowhere, -1), entries)
    store(keys, plan.key_target.masked_fill(nowhere, -1), keyed)


def compress_c128(
    rows: Tensor,
    ape: Tensor,
    fold: Tensor,
    norm: Tensor,
    cos_sin_entries: Tensor,
    plan: C128Plan,
    pool: Paged,
    eps: float,
    *,
    behind: Tensor | None = None,
) -> None:
    """See `weft.kernels.gpu.compress.compress_c128`."""
    entries = folded_c128(rows, ape, fold, plan, behind)
    entries = rotate(rms_norm(entries, norm, eps), cos_sin_entries)
    store(pool, plan.target.masked_fill(plan.sequence < 0, -1), entries)


def pooled_c4(rows: Tensor, ape: Tensor, tail: Tensor, dim: int, plan: C4Plan) -> tuple[Tensor, Tensor]:
    """Entries [E, d] and index keys [E, dI] before norm, float64."""
    half = rows.shape[1] // 2
    wide = 2 * dim
    out = torch.zeros(plan.sequence.numel(), half // 2, dtype=torch.float64, device=rows.device)
    for index, (sequence, number) in enumerate(zip(plan.sequence.tolist(), plan.number.tolist(), strict=True)):
        if sequence < 0:
            continue
        values: list[Tensor] = []
        scores: list[Tensor] = []
        for position in range(max(4 * number - 4, 0), 4 * number + 4):
            row = _row_at(rows, ape, tail, plan, sequence, position)
            current = position >= 4 * number
            for parts, channels in ((values, row[:half]), (scores, row[half:])):
                main, key = channels[:wide].chunk(2), channels[wide:].chunk(2)
                parts.append(torch.cat((main[current], key[current])))
        share = torch.softmax(torch.stack(scores), 0)
        out[index] = (share * torch.stack(values)).sum(0)
    return out[:, :dim], out[:, dim:]


def _row_at(rows: Tensor, ape: Tensor, tail: Tensor, plan: C4Plan, sequence: int, position: int) -> Tensor:
    """A token's row with ape added, from the step or from the tail."""
    start = int(plan.start[sequence])
    if position < start:
        return tail[int(plan.slot[sequence]), position % 8].double()
    row = rows[int(plan.offset[sequence]) + position - start].double()
    row[rows.shape[1] // 2 :] += ape[position % 4]
    return row


def _update_tail(rows: Tensor, ape: Tensor, tail: Tensor, plan: C4Plan) -> None:
    """The addition of ape is float32's, as entries of later steps read it."""
    half = rows.shape[1] // 2
    for sequence, (start, count) in enumerate(zip(plan.start.tolist(), plan.count.tolist(), strict=True)):
        for position in range(max(start, start + count - 8), start + count):
            row = rows[int(plan.offset[sequence]) + position - start].clone()
            row[half:] += ape[position % 4]
            tail[int(plan.slot[sequence]), position % 8] = row


def folded_c128(rows: Tensor, ape: Tensor, fold: Tensor, plan: C128Plan, behind: Tensor | None = None) -> Tensor:
    """Entries [E, d] before norm, float64; `fold` and `behind` are brought up to date."""
    dim = rows.shape[1] // 2
    out = torch.zeros(plan.sequence.numel(), dim, dtype=torch.float64, device=rows.device)
    bounds = plan.entries.tolist()
    for sequence, (start, count) in enumerate(zip(plan.start.tolist(), plan.count.tolist(), strict=True)):
        listed = range(bounds[sequence], bounds[sequence + 1])
        wanted = {int(plan.number[index]): index for index in listed}
        slot, offset, end = int(plan.slot[sequence]), int(plan.offset[sequence]), start + count
        for group in range(start // 128, -(-end // 128)):
            begin, stop = max(start, group * 128), min(end, group * 128 + 128)
            is_open = stop < group * 128 + 128
            if not (is_open or group in wanted) or begin >= stop:
                continue
            state = fold[slot].double() if begin > group * 128 else None
            part = rows[offset + begin - start : offset + stop - start].double()
            values, scores = part[:, :dim], part[:, dim:] + ape[begin % 128 : begin % 128 + stop - begin]
            if behind is not None:
                for step in range(stop - begin):
                    row = offset + begin - start + step
                    behind[row] = _folded(state, values[: step + 1], scores[: step + 1])
            state = _folded(state, values, scores)
            if is_open:
                fold[slot] = state
            else:
                out[wanted[group]] = state[2] / state[1]
    return out


def _folded(state: Tensor | None, values: Tensor, scores: Tensor) -> Tensor:
    """[3, d] (max, sum, weighted sum) of a group that was at `state` and takes these rows."""
    top = scores.amax(0)
    if state is not None:
        top = torch.maximum(top, state[0])
    weight = torch.exp(scores - top)
    total, weighted = weight.sum(0), (weight * values).sum(0)
    if state is not None:
        kept = torch.exp(state[0] - top)
        total, weighted = total + kept * state[1], weighted + kept * state[2]
    return torch.stack((top, total, weighted))


def sylvester(size: int, device: torch.device) -> Tensor:
    """The normalised Hadamard matrix: [size, size] float64, sign (-1)^popcount(i & j)."""
    both = [[(i & j).bit_count() for j in range(size)] for i in range(size)]
    sign: Tensor = 1.0 - 2.0 * (torch.tensor(both, dtype=torch.float64, device=device) % 2)
    return sign / math.sqrt(size)


def example_c4(spans: list[tuple[int, int]], device: str, *, fp4: bool = False, page: int = 64) -> dict[str, Any]:
    """Arguments of `compress_c4` at V4-Flash's sizes. spans: (first position, tokens) of each sequence."""
    from weft.kernels.gpu.compress import C4Plan

    plan, pages = _plan(spans, 4, page)
    tokens, entries = sum(count for _, count in spans), len(plan["number"])
    keys = keys_fp4(page, 128) if fp4 else keys_fp8(page, 128)
    tensors = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in plan.items()}
    return {
        "rows": torch.randn(tokens, 2560, device=device),
        "ape": torch.randn(4, 1280, device=device),
        "tail": torch.randn(len(spans), 8, 2560, device=device),
        "norm": torch.rand(512, device=device) + 0.5,
        "key_norm": torch.rand(128, device=device) + 0.5,
        "cos_sin_entries": angles(4 * tensors["number"], 64) if entries else torch.zeros(0, 64, device=device),
        "plan": C4Plan(**tensors, key_target=tensors["target"].clone()),
        "pool": Pages.empty(pages, kv_fp8(page, 448, 64), device),
        "keys": Pages.empty(pages, keys, device),
        "eps": 1e-6,
        "hadamard": True,
    }


def example_c128(spans: list[tuple[int, int]], device: str, *, page: int = 64) -> dict[str, Any]:
    """Arguments of `compress_c128` at V4-Flash's sizes."""
    from weft.kernels.gpu.compress import C128Plan

    plan, pages = _plan(spans, 128, page)
    tokens = sum(count for _, count in spans)
    tensors = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in plan.items()}
    fold = torch.randn(len(spans), 3, 512, device=device)
    fold[:, 1] = fold[:, 1].abs() + 1
    return {
        "rows": torch.randn(tokens, 1024, device=device),
        "ape": torch.randn(128, 512, device=device),
        "fold": fold,
        "norm": torch.rand(512, device=device) + 0.5,
        "cos_sin_entries": angles(128 * tensors["number"], 64),
        "plan": C128Plan(**tensors),
        "pool": Pages.empty(pages, kv_fp8(page, 448, 64), device),
        "eps": 1e-6,
    }


def _plan(spans: list[tuple[int, int]], ratio: int, page: int) -> tuple[dict[str, list[int]], int]:
    """A plan's fields, entries in rows from the first page on, and how many pages that takes."""
    plan: dict[str, list[int]] = {"start": [], "count": [], "offset": [], "slot": [], "entries": [0]}
    plan |= {"sequence": [], "number": [], "target": []}
    offset = 0
    for index, (start, count) in enumerate(spans):
        for name, value in (("start", start), ("count", count), ("offset", offset), ("slot", index)):
            plan[name].append(value)
        offset += count
        for number in range(start // ratio, (start + count) // ratio):
            plan["target"].append(page + len(plan["number"]))
            plan["sequence"].append(index)
            plan["number"].append(number)
        plan["entries"].append(len(plan["number"]))
    return plan, 2 + len(plan["number"]) // page
