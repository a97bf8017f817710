"""Reading holds one file and one tensor at a time, and says how far it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.runtime.checkpoint import reader
from weft.runtime.checkpoint.headers import INDEX_NAME, read_headers
from weft.runtime.checkpoint.reader import Checkpoint, load_weights


class Opened:
    """Stands in for `safe_open` and records which files are open."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.log: list[str] = []

    def __call__(self, path: Path, framework: str) -> Any:
        return _Recorded(self, path, safe_open(path, framework=framework))


class _Recorded:
    def __init__(self, opened: Opened, path: Path, inner: Any) -> None:
        self.opened, self.path, self.inner = opened, path, inner

    def __enter__(self) -> Any:
        self.opened.now.append(self.path.name)
        self.opened.log.append(self.path.name)
        return self.inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self.opened.now.remove(self.path.name)
        self.inner.__exit__(*error)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    recorder = Opened()
    monkeypatch.setattr(reader, "safe_open", recorder)
    return recorder


def test_one_file_is_open_at_a_time(folder: Path, opened: Opened) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    checkpoint = Checkpoint.open(folder)
    assert opened.log == []
    for _ in checkpoint.load(torch.float32):
        assert len(opened.now) == 1
    assert opened.log == files
    assert opened.now == []


def test_foreign_scales_open_one_file_at_a_time(folder: Path, opened: Opened) -> None:
    """A weight's scale is fetched before the weight's own file is opened."""
    (folder / INDEX_NAME).unlink()
    files = sorted(folder.glob("*.safetensors"))
    for source, other in zip(files, files[1:] + files[:1], strict=True):
        tensors = load_file(source)
        scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
        save_file(tensors, source)
        save_file(scales, other.with_suffix(f".scales{other.suffix}"))
    for name, _ in Checkpoint.open(folder).load(torch.float32):
        assert len(opened.now) == 1 and "scales" not in opened.now[0], name
    assert [name for name in opened.log if "scales" not in name] == [file.name for file in files]
    assert len(opened.log) == 2 * len(files)


def test_tensors_are_handed_over_not_kept(folder: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    stream = Checkpoint.open(folder).load(torch.float32)
    for _, tensor in stream:
        alive.append(weakref.ref(tensor))
        del tensor
        gc.collect(0)
        assert sum(ref() is not None for ref in alive) <= 1


def test_stopping_early_closes_the_file(folder: Path, opened: Opened) -> None:
    stream = Checkpoint.open(folder).load(torch.float32)
    assert isinstance(stream, Iterator)
    next(stream)
    assert len(opened.now) == 1
    stream.close()  # type: ignore[attr-defined]
    assert opened.now == []


def test_tensors_do_not_need_the_files(folder: Path) -> None:
    loaded = load_weights(folder, torch.float32)
    copies = {name: tensor.clone() for name, tensor in loaded.items()}
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as handle:  # in place: a mapping of the file would see it
            handle.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(loaded[name], copies[name]) for name in copies)


def test_progress(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    checkpoint = Checkpoint.open(folder)
    for _ in checkpoint.load(torch.float32, lambda *call: calls.append(call)):
        pass
    assert [name for _, _, name in calls] == sorted(p.name for p in folder.glob("*.safetensors"))
    done = [done for done, _, _ in calls]
    assert done == sorted(done) and done[-1] == checkpoint.nbytes
    assert {total for _, total, _ in calls} == {checkpoint.nbytes}
    assert checkpoint.nbytes == sum(stored.spec.nbytes for stored in read_headers(folder).tensors)
