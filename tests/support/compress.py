"""Sequences fed to the compressors on device tensors, in any chunks, and what has to be in the pools then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.kernels import U32
from support.norms import normed_and_turned, stored_bound
from weft.kernels.gpu.base import Pages
from weft.kernels.gpu.compress import C4Plan, C128Plan, completed, compress_c4, compress_c128
from weft.kernels.layouts import RowLayout
from weft.kernels.reference.compress import sylvester
from weft.kernels.reference.heads import angles
from weft.kernels.reference.rows import gather

ROPE = 16


@dataclass
class Feed:
    """Tokens of several sequences; sequence s keeps its raw state in slot 2 s + 1, entry e in row s * 64 + e + 1.

    What slots held before is not a number, so that reading it shows.
    """

    ratio: int
    lengths: list[int]
    device: str
    layout: RowLayout
    keys: RowLayout | None = None
    spread: float = 3.0
    hadamard: bool = True
    eps: float = 1e-6
    done: list[int] = field(init=False)

    def __post_init__(self) -> None:
        dim, key_dim = self.layout.channels, self.keys.channels if self.keys else 0
        half = 2 * (dim + key_dim) if self.ratio == 4 else dim
        make = {"device": self.device}
        self.tokens = [torch.randn(length, 2 * half, **make) for length in self.lengths]
        for tokens in self.tokens:
            tokens[:, half:] *= self.spread
        self.ape = torch.randn(self.ratio, half, **make)
        self.norm, self.key_norm = torch.randn(dim, **make), torch.randn(key_dim, **make)
        state = (8, 2 * half) if self.ratio == 4 else (3, dim)
        self.state = torch.full((2 * len(self.lengths) + 2, *state), torch.nan, **make)
        pages = len(self.lengths) * 64 // self.layout.page + 2
        self.pool = Pages.empty(pages, self.layout, self.device)
        self.key_pool = Pages.empty(pages, self.keys, self.device) if self.keys else None
        self.done = [0] * len(self.lengths)

    def rows(self, sequence: Any, number: Any) -> Any:
        return sequence * 64 + number + 1

    def step(self, counts: list[int], *, padding: int = 0, chain: list[int] | None = None, **how: Any) -> None:
        """The next counts[s] tokens of each sequence, in one call; those without any are left out."""
        members = [s for s, count in enumerate(counts) if count]
        parts = [self.tokens[s][self.done[s] : self.done[s] + counts[s]] for s in members]
        start = np.array([self.done[s] for s in members])
        count = np.array([counts[s] for s in members])
        below = None if chain is None else np.array([chain[s] for s in members])
        entries, sequence, number = completed(start, count, self.ratio, below)
        target = self.rows(np.array(members)[sequence], number)
        turn = angles(torch.from_numpy(np.append(number, [0] * padding) * self.ratio).to(self.device), ROPE)
        none, zero = np.full(padding, -1), np.zeros(padding, int)
        plan = {
            "start": np.append(start, zero + 7),
            "count": np.append(count, zero),
            "offset": np.append(count.cumsum() - count, zero),
            "slot": np.append([2 * s + 1 for s in members], zero),
            "entries": np.append(entries, zero + entries[-1]),
            "sequence": np.append(sequence, none),
            "number": np.append(number, zero + 1),
            "target": np.append(target, zero),
        }
        on_device = {
            name: torch.tensor(value, dtype=torch.int32, device=self.device) for name, value in plan.items()
        }
        rows = torch.nn.functional.pad(torch.cat(parts), (16, 0))[:, 16:]  # of a wider linear's output
        if self.ratio == 4:
            full = C4Plan(**on_device, key_target=on_device["target"].clone())
            compress_c4(
                rows, self.ape, self.state, self.norm, self.key_norm, turn, full, self.pool, self.key_pool,
                self.eps, hadamard=self.hadamard, **how,
            )  # fmt: skip
        else:
            full = C128Plan(**on_device)
            compress_c128(rows, self.ape, self.state, self.norm, turn, full, self.pool, self.eps, **how)
        for s in members:
            self.done[s] += counts[s]

    def check(self, *, skip: tuple[tuple[int, int], ...] = ()) -> None:
        """Every entry that the tokens so far complete, and nothing else, against float64; skip: (sequence, entry)
        that are not listed."""
        written = torch.zeros(self.pool.bytes.shape[0] * self.layout.page, dtype=torch.bool)
        for sequence, done in enumerate(self.done):
            for entry in range(done // self.ratio):
                if (sequence, entry) not in skip:
                    row = self.rows(sequence, entry)
                    written[row] = True
                    self._check_entry(sequence, entry, row)
        stored = gather(self.pool, torch.arange(len(written), dtype=torch.int32, device=self.device)).cpu()
        assert not stored[~written].any()

    def _check_entry(self, sequence: int, entry: int, row: int) -> None:
        at = torch.tensor([row], dtype=torch.int32, device=self.device)
        turn = angles(torch.tensor([entry * self.ratio], device=self.device), ROPE)
        dim = self.layout.channels
        exact, error = self._pooled(sequence, entry, 0, dim)
        exact, error = normed_and_turned(exact[None], error[None], self.norm, turn, self.eps)
        distance = (gather(self.pool, at) - exact).abs()
        assert (distance <= stored_bound(exact, error, self.layout)).all(), (sequence, entry)
        if self.key_pool is None:
            return
        exact, error = self._pooled(sequence, entry, 2 * dim, self.key_norm.numel())
        exact, error = normed_and_turned(exact[None], error[None], self.key_norm, turn, self.eps)
        if self.hadamard:  # log2 additions and a product, and the errors of all channels
            turned = exact @ sylvester(exact.shape[1], exact.device)
            steps = 9 * U32 * exact.abs().sum() + error.sum()
            exact, error = turned, (steps / exact.shape[1] ** 0.5).expand_as(exact)
        distance = (gather(self.key_pool, at) - exact).abs()
        assert (distance <= stored_bound(exact, error, self.key_pool.layout)).all(), (sequence, entry)

    def _pooled(self, sequence: int, entry: int, first: int, dim: int) -> tuple[Tensor, Tensor]:
        """An entry's channels before norm, and the bound of a float32 softmax pooling of them.

        As for the host's ops: each of N tokens rescales (2 roundings), adds, and takes exp of a difference that is
        off by u of its size; 4 u more for an exp that is good to 2 ulp.
        """
        values, scores = [], []
        ratio = self.ratio
        for position in range(entry * ratio - (4 if ratio == 4 else 0), (entry + 1) * ratio):
            if position >= 0:
                row = self.tokens[sequence][position].double()
                half = row.numel() // 2
                at = first + (dim if ratio == 4 and position >= entry * ratio else 0)
                values.append(row[at : at + dim])
                scores.append((row[half:] + self.ape[position % ratio])[at : at + dim])
        value, score = torch.stack(values), torch.stack(scores)
        share = torch.softmax(score, 0)
        spread = float(score.max() - score.min())
        relative = (9 * len(score) + 4 * spread + 10) * U32
        return (share * value).sum(0), 2 * relative * (share * value.abs()).sum(0)
