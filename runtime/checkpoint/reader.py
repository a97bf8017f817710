"""Read a checkpoint: official names and dequantised tensors, one file at a time.

Files are memory-mapped and only one is open at any moment; every tensor handed out is a copy, so
neither the file nor its mapping is needed once `load` has moved on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.runtime.checkpoint.headers import read_headers
from weft.runtime.checkpoint.layout import Weight
from weft.runtime.checkpoint.plan import Item, Layout, Plan, make_plan
from weft.runtime.checkpoint.quant import Quantised, as_e8m0
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, name of the file just read

_FILES_OPEN = 4  # by tensors on demand: merged experts and scales may alternate between files


class Checkpoint:
    """A checkpoint on disk whose headers were checked against the config; no weight is read yet.

    `config` is that of config.json, without MTP block if the files are Hugging Face's and hold
    none. `layout` says how the tensors are named, `files` which files hold them, `nbytes` how much
    `load` will read, `items` where each weight is stored, `skipped` which stored tensors have no use
    here (the draft stages of V4-Flash-0731), and `notices` what the user should be told about that.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.config: ModelConfig = plan.config
        self.layout: Layout = plan.layout
        self.files: tuple[str, ...] = plan.files
        self.skipped: tuple[str, ...] = plan.skipped
        self.notices: tuple[str, ...] = plan.notices
        self.items: tuple[Item, ...] = plan.items
        self.nbytes: int = sum(item.nbytes for item in plan.items)
        self._by_file: dict[str, list[Item]] = defaultdict(list)
        for item in sorted(plan.items, key=lambda item: item.stored.file):
            self._by_file[item.stored.file].append(item)

    @classmethod
    def open(cls, path: Path | str, config: ModelConfig | None = None, *, drafts: bool = False) -> Checkpoint:
        """Read config.json (unless `config` is given) and the headers of all files in `path`.

        With `drafts` the weights of draft stages are handed out like all others, not skipped.
        Raises `ConfigError` for the config and one `CheckpointError` that lists every missing,
        unexpected, misshaped or mistyped tensor and every unreadable file.
        """
        path = Path(path)
        if config is None:
            config = ModelConfig.load(path)
        return cls(path, make_plan(config, read_headers(path), str(path), drafts=drafts))

    def load(self, dtype: torch.dtype, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (official name, tensor) for every weight, file by file.

        Floats come as `dtype` (float32 or bfloat16), except those the model always wants in
        float32 (`Weight.is_float32`); expert tables as int64. Raises `CheckpointError` naming the
        file if it cannot be read.
        """
        assert dtype in (torch.float32, torch.bfloat16), dtype
        done = 0
        for file, items in self._by_file.items():
            scales = self._read_foreign_scales(file, items)
            with _open(self.path / file) as shard:
                for item in items:
                    yield item.weight.name, _read(shard, scales, item, dtype)
                    done += item.nbytes
            if progress is not None:
                progress(done, self.nbytes, file)

    def on_demand(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What `load` yields, each tensor read when it is asked for, and not kept."""
        assert dtype in (torch.float32, torch.bfloat16), dtype
        return _OnDemand(self, dtype)

    def stored(self, progress: Progress | None = None) -> Mapping[str, Tensor | Quantised]:
        """Every weight as the files hold it, read when it is asked for, and not kept: `Quantised` with E8M0
        scales, or a plain tensor of whatever dtype. Scales that E8M0 does not hold give float32 values."""
        return _Stored(self, progress)

    def _read_foreign_scales(self, file: str, items: list[Item]) -> dict[str, Tensor]:
        """Scales that live in another file than their matrix, by official weight name."""
        elsewhere: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            if item.scale is not None and item.scale.file != file:
                elsewhere[item.scale.file].append(item)
        scales = {}
        for other, wanted in elsewhere.items():
            with _open(self.path / other) as shard:
                for item in wanted:
                    assert item.scale is not None
                    scales[item.weight.name] = shard.get_tensor(item.scale.spec.name).clone()
        return scales


class _Lazy(Mapping[str, T]):
    """Keeps the files used last open: opening one takes longer than reading a small matrix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._items = {item.weight.name: item for item in checkpoint.items}
        self._shards: dict[str, Any] = {}  # file -> open shard, the one used last at the end

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def _open(self, item: Item) -> tuple[Any, dict[str, Tensor]]:
        """The shard of an item, and its scales if they are in another."""
        file, scales = item.stored.file, {}
        if item.scale is not None and item.scale.file != file:
            with _naming(self._path / item.scale.file):
                scales[item.weight.name] = self._shard(item.scale.file).get_tensor(item.scale.spec.name)
        return self._shard(file), scales

    def _shard(self, file: str) -> Any:
        shard = self._shards.pop(file, None)
        if shard is None:
            if len(self._shards) == _FILES_OPEN:
                del self._shards[next(iter(self._shards))]
            shard = safe_open(self._path / file, framework="pt")
        self._shards[file] = shard
        return shard


class _OnDemand(_Lazy[Tensor]):
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint)
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        item = self._items[name]
        with _naming(self._path / item.stored.file):
            return _read(*self._open(item), item, self._dtype)


class _Stored(_Lazy[Tensor | Quantised]):
    def __init__(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        super().__init__(checkpoint)
        self._progress = progress
        self._done, self._total = 0, checkpoint.nbytes

    def __getitem__(self, name: str) -> Tensor | Quantised:
        item = self._items[name]
        with _naming(self._path / item.stored.file):
            out = _read_stored(*self._open(item), item)
        self._done += item.nbytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, item.stored.file)
        return out


def load_weights(
    path: Path | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    config: ModelConfig | None = None,
) -> dict[str, Tensor]:
    """All weights of the checkpoint in `path` by official name; see `Checkpoint.load`."""
    return dict(Checkpoint.open(path, config).load(dtype, progress))


def runtime_dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """The dtype of `weight` in a model that runs in `dtype`."""
    if weight.storage == "i64":
        return torch.int64
    return torch.float32 if weight.is_float32 else dtype


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with _naming(path), safe_open(path, framework="pt") as shard:
        yield shard


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the file system or the format become `CheckpointError` with `path`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(shard: Any, scales: dict[str, Tensor], item: Item, dtype: torch.dtype) -> Tensor:
    target = runtime_dtype(item.weight, dtype)
    if item.scale is None:
        return _copy(_plain(shard, item), target)
    return _quantised(shard, scales, item).dequantised(target)


def _read_stored(shard: Any, scales: dict[str, Tensor], item: Item) -> Tensor | Quantised:
    if item.scale is None:
        return _plain(shard, item).clone()
    found = _quantised(shard, scales, item)
    scale = as_e8m0(found.scale)
    if scale is None:
        return found.dequantised(torch.float32)
    return Quantised(found.codes.clone(), scale.clone(), found.shape)


def _plain(shard: Any, item: Item) -> Tensor:
    """A view of the mapped file."""
    name = item.stored.spec.name
    found: Tensor = shard.get_tensor(name) if item.part is None else shard.get_slice(name)[item.part]
    return found


def _quantised(shard: Any, scales: dict[str, Tensor], item: Item) -> Quantised:
    assert item.scale is not None
    scale = scales.get(item.weight.name)
    if scale is None:
        scale = shard.get_tensor(item.scale.spec.name)
    rows, columns = item.weight.shape
    return Quantised(shard.get_tensor(item.stored.spec.name), scale, (rows, columns))


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy even without a conversion: the source is a view of the mapped file.
    return tensor.to(dtype, copy=True)
