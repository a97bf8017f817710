"""Write a checkpoint in the official layout: config.json, sharded safetensors, index.

The same weights give the same bytes. A reader never sees half of a checkpoint: everything is
written to a folder beside the target, which then gets the target's name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.checkpoint.layout import Weight, weights
from weft.runtime.checkpoint.quant import quantise_fp4, quantise_fp8
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

    `tensors` maps official names to tensors [the logical shape]; each is taken once, in file order,
    so a mapping may make them on demand. `tokenizer_json` is the text of tokenizer.json. A shard
    holds whole weights (with their scales) of at most `max_shard_bytes`, or one larger weight.

    Raises `CheckpointError` if `path` exists and is not an empty folder, if a weight is not finite,
    or if the files cannot be written; nothing is left behind then.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: exists and is not an empty folder")
    assert set(tensors) == {weight.name for weight in weights(config)}, "weights do not fit config"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", config.to_dict())
        if tokenizer_json is not None:
            (temporary / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        _write_shards(temporary, list(_shards(weights(config), max_shard_bytes)), tensors)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        # After a success the folder has its final name and there is nothing to remove.
        shutil.rmtree(temporary, ignore_errors=True)


def _shards(order: Iterable[Weight], max_bytes: int) -> Iterable[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in order:
        nbytes = sum(spec.nbytes for spec in weight.tensors())
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += nbytes
    yield shard


def _write_shards(folder: Path, shards: list[list[Weight]], tensors: Mapping[str, Tensor]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored: dict[str, Tensor] = {}
        for weight in shard:
            stored |= _encode(weight, tensors[weight.name])
        save_file(stored, folder / file, metadata={"format": "pt"})
        # safetensors makes its files private; these get the mode any new file would have.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map |= dict.fromkeys(stored, file)
        total += sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)


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


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
