"""The training forward against the runtime's model: same weights, same tokens, same logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from weft.runtime.cache.base import Span
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.cache.pools import Pools
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.config import ModelConfig, preset
from weft.runtime.embedded.layers import Mode
from weft.runtime.embedded.network import Network
from weft.runtime.embedded.params import stack
from weft.runtime.embedded.rows import Document, as_rows, pack
from weft.runtime.model.batch import Batch
from weft.runtime.model.model import Model

CONFIG = dataclasses.replace(preset("tiny"), num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 4, 0))
LENGTHS = (130, 5, 127, 300)


def runtime_logits(
    config: ModelConfig, weights: dict[str, Tensor], ids: Tensor, quant: bool
) -> tuple[Tensor, Tensor]:
    """The logits of each token, and those the MTP block gives where it knows the next token."""
    model = Model(config, weights, quant_sim=quant)
    pools = Pools(config, PoolSizes(tokens=1024, slots=1, context=1024, burst=512))
    state = SequenceState(pools)
    state.reserve(len(ids))
    batch = Batch(pools, [Span(state.slot, 0, len(ids))])
    h = model.forward(ids, batch)
    draft = model.forward_mtp(h, torch.cat((ids[1:], ids[:1])), batch)
    return model.logits(h), model.mtp_logits(draft)[:-1]


@pytest.mark.parametrize("quant", [False, True])
def test_packed_documents_have_the_runtimes_logits(quant: bool) -> None:
    weights = dummy_weights(CONFIG, 3)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, CONFIG.vocab_size, (n,), generator=generator) for n in LENGTHS]
    (row,) = pack([Document(d.tolist(), [True] * len(d), 0) for d in documents], 768)
    rows = as_rows([row])
    params = stack(CONFIG, weights)
    out = Network.build(CONFIG)(params, rows.ids, rows.positions, Mode(rounding=quant))
    logits, drafts = (hidden[0] @ params["head.weight"].T for hidden in (out.hidden, out.draft))
    for number, document in enumerate(documents, 1):
        (start, *_) = (rows.document[0] == number).nonzero()[:, 0].tolist()
        mine = logits[start : start + len(document)]
        expected, expected_drafts = runtime_logits(CONFIG, weights, document, quant)
        # Values next to a rounding boundary may round the other way: then a few rows differ.
        # A value next to a rounding boundary may round the other way, and later rows see it.
        share = 0.6 if quant else 1.0
        assert close_rows(mine, expected) >= share
        assert close_rows(drafts[start : start + len(document) - 1], expected_drafts) >= share


def close_rows(mine: Tensor, expected: Tensor) -> float:
    """Share of rows that agree within 1e-3."""
    return ((mine - expected).abs().amax(1) < 1e-3).float().mean().item()
