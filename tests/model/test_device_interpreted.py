"""One step of the model through the Triton kernels, interpreted or on a GPU, beside the ops' references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import draw
from support.device import DEVICE, checkpoint, logits_of, on_device, on_stored, references, tokens_for
from support.engine import small_config
from support.pools import poison
from support.rounded import round_activations
from support.run import pools_for, step
from weft.kernels.gpu import base, interpreter
from weft.runtime.cache.sequence import SequenceState
from weft.runtime.model.cuda.model import DeviceModel
from weft.runtime.model.model import Model

if DEVICE == "cpu":
    interpreter.install()


def both(model: DeviceModel, ids: list[int], chunks: tuple[int, ...]) -> torch.Tensor:
    """The largest difference of each row."""
    got = logits_of(model, ids, chunks)
    model._pads = False  # references cannot be captured
    with references(everywhere=True):
        want = logits_of(model, ids, chunks)
    return (got - want).abs().amax(1)


def test_a_step_of_every_kind_of_layer() -> None:
    """Kernels take attention's products in float16, 2^-11 of their size, and add in float32: rows are off by about
    1e-3, more where a value is rounded the other way, and by something else altogether if a kernel is wrong."""
    if DEVICE == "cpu":
        assert base.arch_of("cpu") == "interpreter"
    config = small_config(0, 4, 128)
    model = on_device(config, draw.random_weights(config, 0))
    difference = both(model, tokens_for(model, 27), (26, 1))
    assert float(difference.median()) < 5e-3
    assert float(difference.max()) < 0.2


@pytest.mark.slow
def test_an_entry_of_128_and_its_successors() -> None:
    config = small_config(4, 128)
    model = on_device(config, draw.random_weights(config, 1))
    difference = both(model, tokens_for(model, 135), (100, 1, 30, 4))
    assert float(difference.median()) < 5e-3
    assert float(difference.max()) < 0.3


@pytest.mark.slow
def test_bfloat16() -> None:
    """Streams and activations are off by 2^-9 already."""
    config = small_config(0, 4, 128)
    model = on_device(config, draw.random_weights(config, 0), torch.bfloat16)
    difference = both(model, tokens_for(model, 27), (26, 1))
    assert float(difference.median()) < 0.1
    assert float(difference.max()) < 1


@pytest.mark.slow
def test_a_row_has_the_same_bits_however_it_is_computed() -> None:
    """In chunks, beside a fork, on pages of another size, what nobody holds being NaN: as alone and at once. On
    CPU tensors, where linears are row-invariant too; it is the kernels that this is about."""
    if DEVICE != "cpu":
        pytest.skip("products of cuBLAS depend on the number of rows")
    config = small_config(0, 4, 128)
    model = on_device(config, draw.random_weights(config, 0))
    ids, other = tokens_for(model, 36), tokens_for(model, 8, 3)
    pools = pools_for(model, [ids] * 4, 4, "fp8", "fp4")
    state = SequenceState(pools)
    poison(pools)
    streams = step(model, [(state, ids[:26])])
    fork = state.fork()
    for start, end in ((0, 4), (4, 10)):
        poison(pools)
        streams.append(step(model, [(state, ids[26 + start : 26 + end]), (fork, other[start:end])])[0])
    assert torch.equal(model.logits(torch.cat(streams)), logits_of(model, ids))


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_step_on_stored_weights_is_the_hosts(tmp_path: Path, ratio: int) -> None:
    """FP8 and FP4 weights, beside the CPU model on their values with rounded activations. An activation that is
    rounded the other way moves what is summed of 32 to 64 by 2^-4 / sqrt(32), about 1e-2, in a few rows. A model
    without any of the rounding is off by 0.1 in all."""
    found = checkpoint(tmp_path, 0, ratio)
    model = on_stored(found)
    host = round_activations(Model(found.config, dict(found.load(torch.float32)), quant_sim=True))
    ids = tokens_for(host, 25)
    got, want = logits_of(model, ids, (23, 1)), logits_of(host, ids)
    difference = (got - want).abs().amax(1) / max(1.0, float(want.std()))
    assert float(difference.median()) < (1e-3 if DEVICE == "cpu" else 0.03)
    assert float(difference.max()) < 0.2
