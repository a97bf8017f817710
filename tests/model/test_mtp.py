"""The MTP block against an independent float64 reference, whole and in pieces."""

import pytest
import torch

from support import hf
from support.reference import reference_mtp
from support.run import pools_for, run_streams
from weft.runtime.cache.base import Span
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.config import preset
from weft.runtime.model.batch import Batch
from weft.runtime.model.model import Model

LENGTH = 150


def setup(seed: int) -> tuple[Model, dict[str, torch.Tensor], list[int]]:
    config = preset("tiny") if seed == 0 else hf.random_config(seed)
    weights = hf.random_weights(config, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (LENGTH,), generator=generator).tolist()
    return Model(config, weights), weights, ids


def mtp_in_pieces(model: Model, ids: list[int], pieces: list[int]) -> torch.Tensor:
    """Backbone and MTP alternate, as in decoding: MTP row i runs once token i + 1 is known."""
    state = SequenceState(pools_for(model, [ids]))
    previous, start, out = None, 0, []
    for size in pieces:
        part = ids[start : start + size]
        state.reserve(len(part))
        streams = model.forward(torch.tensor(part), Batch(state.pools, [state.span(len(part))]))
        rows = streams[:-1] if previous is None else torch.cat((previous[None], streams[:-1]))
        first = max(0, start - 1)
        if rows.shape[0]:
            batch = Batch(state.pools, [Span(state.slot, first, rows.shape[0])])
            following = torch.tensor(ids[first + 1 : first + 1 + rows.shape[0]])
            out.append(model.forward_mtp(rows, following, batch))
        state.commit(len(part))  # only now may window rows go
        previous, start = streams[-1], start + len(part)
    return torch.cat(out)


@pytest.mark.parametrize("seed", range(6))
def test_mtp_agrees_with_the_published_equations(seed: int) -> None:
    model, weights, ids = setup(seed)
    streams = run_streams(model, ids)
    ours = mtp_in_pieces(model, ids, [LENGTH])
    positions = torch.arange(LENGTH - 1)
    theirs, logits = reference_mtp(model.config, weights, streams[:-1].double(), torch.tensor(ids[1:]), positions)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.std()
    assert (model.mtp_logits(ours) - logits).abs().max() < 1e-4 * max(1.0, float(logits.std()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [7] * 22, [40, 1, 1, 60, 48], [149, 1]])
def test_mtp_in_pieces_gives_the_same_bits(seed: int, pieces: list[int]) -> None:
    model, _, ids = setup(seed)
    assert torch.equal(mtp_in_pieces(model, ids, pieces), mtp_in_pieces(model, ids, [LENGTH]))
