"""A padded decode step through the Triton kernels, interpreted or on a GPU: no other bits, and no wait for
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support import draw
from support.device import DEVICE, references, tokens_for
from support.engine import small_config
from support.run import pools_for, step
from weft.kernels.gpu import interpreter
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.batch import Batch
from weft.runtime.model.cuda import shape
from weft.runtime.model.cuda.model import DeviceModel

if DEVICE == "cpu":
    interpreter.install()


class NoHostValues(TorchDispatchMode):
    """Refuses what makes a program wait for its device: a number read, or a shape that depends on numbers."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.WAIT, f"{name} in a step"
        if name in ("index", "index_put", "index_put_"):
            kinds = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in kinds and torch.uint8 not in kinds, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def run(graphs: bool, *, watched: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Streams and logits of a verify step and a decode step of three sequences, and what is behind them."""
    config = small_config(0, 4, 128)
    weights = draw.random_weights(config, 0)
    model = DeviceModel(config, weights, dtype=torch.float32, device=DEVICE, graphs=graphs)
    ids = [tokens_for(model, 20, seed) for seed in range(3)]
    pools = pools_for(model, ids, 16, "fp8", "fp8")
    states = [SequenceState(pools) for _ in ids]
    with references(everywhere=True):
        step(model, [(state, own[:length]) for state, own, length in zip(states, ids, (3, 10, 6), strict=True)])
    out = []
    for counts in ((2, 1, 1), (1, 1, 1)):
        spans, fed = [], []
        for state, own, count in zip(states, ids, counts, strict=True):
            state.reserve(count)
            spans.append(state.span(count))
            fed += own[state.length : state.length + count]
        batch, given = Batch(pools, spans, drafts=counts[0] > 1), torch.tensor(fed)
        if watched:
            with NoHostValues():
                h = model.forward(given, batch)
                out.append(model.logits(h))
        else:
            h = model.forward(given, batch)
            out.append(model.logits(h))
        for state, count in zip(states, counts, strict=True):
            state.commit(count)
        out.append(h.flatten(1))
    slots = [state.slot for state in states]
    pages = [own.bytes for own in (*pools.pages, *pools.key_pages)]
    memory = [*pages, pools.c4_tail[:, slots], pools.c128_fold[:, slots], pools.streams[slots]]
    return torch.cat([part.flatten() for part in out]), memory


def test_a_padded_step_has_the_same_bits_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "SIZES", (4,))
    got, memory = run(True, watched=DEVICE == "cpu")
    want, other = run(False)
    assert torch.equal(got, want)
    for a, b in zip(memory, other, strict=True):
        assert torch.equal(a, b)
