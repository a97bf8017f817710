"""Write a checkpoint in the official layout: config.json, sharded safetensors, index.

The same weights give the same bytes. A reader never sees half of a checkpoint: everything is
written to a folder beside the target, which then gets the target's name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.checkpoint.layout import Weight, stored_weights
from weft.runtime.checkpoint.quant import quantise_fp4, quantise_fp8
from weft.runtime.checkpoint.reader import Progress
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 << 30

_TORCH_DTYPE = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}


def write_official(
    path: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_json: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write every weight of `config`, quantised as its layout says, to the new folder `path`.

    `tensors` maps official names to tensors [the logical shape], those of draft stages included;
    each is taken once, in file order, so a mapping may make them on demand. `tokenizer_json` is the
    text of tokenizer.json.

    Raises `CheckpointError` if `path` exists and is not an empty folder, if a weight is not finite,
    or if the files cannot be written; nothing is left behind then.
    """
    with new_folder(path) as folder:
        write_json(folder / "config.json", config.to_dict())
        if tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        write_weights(folder, list(stored_weights(config)), tensors, max_shard_bytes=max_shard_bytes)


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when the block is left without an exception.

    `CheckpointError` if `path` exists and is not an empty folder, or for an error of the file
    system inside the block. After any exception nothing is left behind.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: exists and is not an empty folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        # After a success the folder has its final name and there is nothing to remove.
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(
    folder: Path,
    order: list[Weight],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int,
    rename: Callable[[str], str] = str,
    progress: Progress | None = None,
) -> None:
    """Write the shards and the index of `order` to `folder`, which holds config.json already.

    Each tensor is encoded in its weight's storage and saved under `rename` of its official name. A
    shard holds whole weights (with their scales) of at most `max_shard_bytes`, or one larger weight,
    and is what is in memory at a time.
    """
    assert set(tensors) == {weight.name for weight in order}, "weights do not fit config"
    shards = list(_shards(order, max_shard_bytes))
    total = sum(_nbytes(weight) for weight in order)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored: dict[str, Tensor] = {}
        for weight in shard:
            stored |= {rename(name): part for name, part in _encode(weight, tensors[weight.name]).items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
        # safetensors makes its files private; these get the mode any new file would have.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map |= dict.fromkeys(stored, file)
        done += sum(_nbytes(weight) for weight in shard)
        if progress is not None:
            progress(done, total, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _shards(order: Iterable[Weight], max_bytes: int) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in order:
        nbytes = _nbytes(weight)
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += nbytes
    yield shard


def _nbytes(weight: Weight) -> int:
    return sum(spec.nbytes for spec in weight.tensors())


def _encode(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    """Official name -> stored tensor: the weight itself, or its codes and scales."""
    assert tuple(tensor.shape) == weight.shape, f"{weight.name}: {tensor.shape}, {weight.shape}"
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{weight.name} has values that are not finite")
    tensor = tensor.detach().cpu()
    if weight.storage == "fp8":
        parts = quantise_fp8(tensor)
    elif weight.storage == "fp4":
        parts = quantise_fp4(tensor)
    else:
        # A copy: safetensors refuses tensors that share memory.
        return {weight.name: tensor.to(_TORCH_DTYPE[weight.storage], copy=True).contiguous()}
    names = [spec.name for spec in weight.tensors()]
    return dict(zip(names, parts, strict=True))
