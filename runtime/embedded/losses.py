"""Losses and scores of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.runtime.embedded.data import TASKS
from weft.runtime.embedded.rows import Rows


def losses(
    hidden: Tensor, draft: Tensor, head: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Mean losses: of the tokens the model says, by their weights, of the others, of the MTP block's. And which
    tokens [B, T] would be drawn right, by the head and by the MTP block."""
    mine, said, hits = _loss(hidden, head, rows, 1)
    drafted, saved, guessed = _loss(draft, head, rows, 2)
    return (
        _mean(mine, said * rows.weight),
        _mean(mine, (rows.document > 0) & ~rows.learn),
        _mean(drafted, saved * rows.weight),
        (hits, guessed),
    )


def _loss(hidden: Tensor, head: Tensor, rows: Rows, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token [B, T], read off the row `ahead` before it: the loss, whether the model says it, whether it is
    the likeliest."""
    dtype = torch.bfloat16 if hidden.is_cuda else torch.float32
    logits = F.linear(hidden[:, :-ahead].to(dtype), head.to(dtype)).float()
    target = rows.ids[:, ahead:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    hits = logits.argmax(-1) == target
    said = rows.learn & (rows.positions >= ahead)
    return F.pad(loss, (ahead, 0)), said, F.pad(hits, (ahead, 0))


def _mean(loss: Tensor, weight: Tensor) -> Tensor:
    return (loss * weight).sum() / weight.sum().clamp_min(1)


def tally(rows: Rows, hits: Tensor, drafted: Tensor) -> Tensor:
    """[tasks, 4]: documents all right, documents, tokens drafted right, tokens."""
    key = rows.document + (rows.document.amax() + 1) * torch.arange(len(rows.ids), device=rows.ids.device)[:, None]
    key, learn = key[rows.learn], rows.learn
    size = int(key.max()) + 1
    wrong = torch.zeros(size, device=key.device).index_add_(0, key, (~hits[learn]).float())
    task = torch.full((size,), -1, device=key.device).index_put_((key,), rows.task[learn])
    out = torch.zeros(len(TASKS), 4, device=key.device)
    real = task >= 0
    out[:, 0].index_add_(0, task[real], (wrong[real] == 0).float())
    out[:, 1].index_add_(0, task[real], torch.ones_like(wrong[real]))
    out[:, 2].index_add_(0, rows.task[learn], drafted[learn].float())
    out[:, 3].index_add_(0, rows.task[learn], torch.ones_like(drafted[learn].float()))
    return out.cpu()
