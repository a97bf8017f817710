"""The parts of the training: packing, roundings, stacked tensors, the optimiser, and a whole small training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.runtime.checkpoint.dummy import dummy_weights
from weft.runtime.checkpoint.layout import Storage, weights
from weft.runtime.checkpoint.quant import dequantise_fp4, dequantise_fp8, quantise_fp4, quantise_fp8
from weft.runtime.checkpoint.reader import Checkpoint
from weft.runtime.config import preset
from weft.runtime.embedded import export, train
from weft.runtime.embedded.optimizer import orthogonal
from weft.runtime.embedded.params import as_shipped, stack, trained_weights, unstack
from weft.runtime.embedded.recipe import CONFIG, RECIPES
from weft.runtime.embedded.rounding import rounded
from weft.runtime.embedded.rows import Document, as_rows, pack
from weft.runtime.text.tokenizer import Tokenizer

TINY = preset("tiny")
BYTES = {"bf16": 2, "f32": 4, "i64": 8}


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_every_document_is_packed_once_and_whole(sizes: list[int]) -> None:
    documents = [Document(list(range(3, 3 + n)), [i % 3 == 0 for i in range(n)], n) for n in sizes]
    rows = as_rows(list(pack(documents, 512)))
    found = []
    for row in range(len(rows.ids)):
        for number in range(1, int(rows.document[row].max()) + 1):
            at = (rows.document[row] == number).nonzero()[:, 0]
            start, size = int(at[0]), len(at)
            assert at.tolist() == list(range(start, start + size))
            assert start % (128 if size >= 128 else 4) == 0
            assert rows.positions[row, at].tolist() == list(range(size))
            assert rows.learn[row, at].tolist() == [i % 3 == 0 for i in range(size)]
            assert set(rows.task[row, at].tolist()) == {size}
            assert rows.ids[row, at].tolist() == list(range(3, 3 + size))
            found.append(size)
    assert sorted(found) == sorted(sizes)


def test_filling_belongs_to_no_document_and_sees_none() -> None:
    rows = as_rows(list(pack([Document([5] * 130, [True] * 130, 0)], 512)))
    filling = rows.document == 0
    assert filling.sum() == 512 - 130
    assert not rows.learn[filling].any()
    tokens = torch.arange(512)
    assert (tokens - rows.positions[0])[filling[0]].min() >= 130


@pytest.mark.parametrize("storage", ["fp8", "fp4", "bf16"])
def test_a_rounded_weight_is_what_its_file_gives(storage: Storage) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(130, 200, generator=generator) * torch.rand(130, 1, generator=generator).exp2()
    weight.requires_grad_()
    if storage == "fp8":
        expected = dequantise_fp8(*quantise_fp8(weight.detach()), torch.float32)
    elif storage == "fp4":
        expected = dequantise_fp4(*quantise_fp4(weight.detach()), 200, torch.float32)
    else:
        expected = weight.detach().bfloat16().float()
    value = rounded(weight, storage)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    (value * 3).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 3))


def test_stacked_tensors_are_the_official_ones() -> None:
    official = dummy_weights(TINY, 1)
    params = stack(TINY, official)
    assert params.keys() == trained_weights(TINY).keys()
    back = unstack(TINY, params)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name].to(back[name].dtype)) for name in official)


def test_shipped_tensors_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    params = stack(TINY, dummy_weights(TINY, 1))
    master = tmp_path / "master.pt"
    torch.save(params, master)
    recipes = {"tiny": dataclasses.replace(RECIPES["smoke"], config=TINY)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "RECIPES", recipes)
        assert export.main([str(master), str(tmp_path / "out"), "--recipe", "tiny"]) == 0
    loaded = dict(Checkpoint.open(tmp_path / "out").load(torch.float32))
    shipped = unstack(TINY, as_shipped(TINY, params))
    for weight in weights(TINY):
        torch.testing.assert_close(shipped[weight.name], loaded[weight.name].to(shipped[weight.name].dtype))
    assert Tokenizer.load(tmp_path / "out").size == 2048


def test_muon_makes_matrices_orthogonal() -> None:
    for shape in ((3, 64, 128), (2, 128, 64)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
        values = torch.linalg.svdvals(orthogonal(matrices))
        assert values.min() > 0.7 and values.max() < 1.2


def test_the_model_fits_in_12_mb() -> None:
    size = sum(spec.nbytes for weight in weights(CONFIG) for spec in weight.tensors())
    assert size < 12e6
    parameters = sum(int(np.prod(weight.shape)) for weight in weights(CONFIG))
    assert 6e6 < parameters < 30e6


def test_a_training_in_pieces_goes_through_every_stage(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--recipe", "smoke", "--workers", "1", "--log-every", "1"]
    assert train.main([*arguments, "--piece", "0"]) == train.UNFINISHED
    assert not (tmp_path / "master.pt").exists()
    assert train.main(arguments) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "said" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, RECIPES["smoke"].steps + 1))
    assert sorted({entry["stage"] for entry in steps}) == [0, 1, 2]
    assert steps[-1]["said"] < steps[0]["said"] - 0.5
    assert sum(count for *_, count in log[-1]["held out"].values()) > 0
    params = torch.load(tmp_path / "master.pt", weights_only=True)
    assert unstack(RECIPES["smoke"].config, params).keys() == {w.name for w in weights(RECIPES["smoke"].config)}
