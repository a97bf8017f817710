"""The forward pass for training: whole documents side by side, differentiable, on any device.

It computes what `weft.runtime.model` computes (a test compares them), over rows of packed documents instead of
paged sequences. Documents start where no compressed group that they can see crosses two of them (`rows`), and
`positions` alone tells what a token may see: token t of a row belongs to the document that starts at
t - positions[t].

Letters in shapes: B rows, T tokens of a row, N = B * T, D hidden, hc streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.runtime.config import ModelConfig
from weft.runtime.embedded import attention, layers
from weft.runtime.embedded.attention import Turn
from weft.runtime.embedded.layers import Mode, Params, norm, product
from weft.runtime.model.context import Rope


class Output(NamedTuple):
    """hidden, draft: [B, T, D] the head's input, and that of the MTP block: row t predicts t + 1 and t + 2.
    index_loss: how far the indexers are from the attention they should foresee, summed over layers.
    load: [gated layers, experts] share of tokens that each expert got."""

    hidden: Tensor
    draft: Tensor
    index_loss: Tensor
    load: Tensor


@dataclass(frozen=True)
class Network:
    """The parts of a block without attention, each compiled by itself: they see the same shapes at any length."""

    config: ModelConfig
    enter: Callable[..., tuple[Tensor, Tensor, Tensor]]
    leave: Callable[..., Tensor]
    experts: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def build(cls, config: ModelConfig, wrap: Callable[[Any], Any] = lambda function: function) -> Network:
        """wrap: torch.compile, on a GPU."""
        return cls(config, *map(wrap, (layers.enter, layers.leave, layers.experts)))

    def __call__(self, params: Params, ids: Tensor, positions: Tensor, mode: Mode) -> Output:
        """ids, positions: [B, T] int64, T a multiple of 128 and of the window."""
        config = self.config
        rope = Rope(config)
        plain, compressed = _turn(positions, rope.plain), _turn(positions, rope.compressed)
        embedding = F.embedding(ids, params["embed.weight"])
        h = embedding.flatten(0, 1)[:, None].expand(-1, config.hc_mult, -1).contiguous()
        losses, loads = [], []
        for layer, kind in enumerate(config.layer_kinds):
            own = under(params, f"layers.{layer}.")
            turn = plain if kind == "window" else compressed
            picks = own["ffn.gate.tid2eid"][ids.flatten()] if config.is_hash_layer(layer) else None
            h, loss, load = self._block(own, h, positions, turn, picks, kind, mode)
            losses.append(loss)
            if picks is None:
                loads.append(load)
        mtp = under(params, "mtp.0.")
        follow = F.pad(embedding[:, 1:], (0, 0, 0, 1)).flatten(0, 1)
        e = product(norm(follow, mtp["enorm.weight"], config), mtp["e_proj.weight"], mode)
        p = product(norm(h, mtp["hnorm.weight"], config), mtp["h_proj.weight"], mode)
        drafted, _, load = self._block(mtp, e[:, None] + p, positions, plain, None, "window", mode)
        loads.append(load)
        return Output(
            layers.head_input(h, params, config).unflatten(0, ids.shape),
            layers.head_input(drafted, mtp, config).unflatten(0, ids.shape),
            torch.stack(losses).sum(),
            torch.stack(loads),
        )

    def _block(
        self, own: Params, h: Tensor, positions: Tensor, turn: Turn, picks: Tensor | None, kind: str, mode: Mode
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, hc, D] -> the same, the indexer's loss and the experts' load. picks: [N, k] of a hash layer."""
        config = self.config
        x, post, comb = self.enter(config, h, *_mixer(own, "attn"))
        y, loss = self._attended(under(own, "attn."), x.unflatten(0, positions.shape), positions, turn, kind, mode)
        h = self.leave(h, y.flatten(0, 1), post, comb)
        x, post, comb = self.enter(config, h, *_mixer(own, "ffn"))
        y, load = self.experts(config, under(own, "ffn."), x, picks, mode)
        return self.leave(h, y, post, comb), loss, load

    def _attended(
        self, own: Params, x: Tensor, positions: Tensor, turn: Turn, kind: str, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        chosen = None
        if kind == "c4a" and mode.sparse:
            with torch.no_grad():
                chosen = attention.choose(self.config, own, x, positions, turn, mode)
        arguments = (self.config, own, x, positions, turn, kind, chosen, mode)
        if not mode.recompute:
            return attention.attend(*arguments)
        out: tuple[Tensor, Tensor] = checkpoint(attention.attend, *arguments, use_reentrant=False)
        return out


def _mixer(own: Params, part: str) -> tuple[Tensor, ...]:
    return (*(own[f"hc_{part}_{name}"] for name in ("fn", "base", "scale")), own[f"{part}_norm.weight"])


def under(params: Params, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _turn(positions: Tensor, frequencies: Tensor) -> Turn:
    angle = positions.float()[..., None] * frequencies.to(positions.device)
    return Turn(torch.cos(angle), torch.sin(angle))
