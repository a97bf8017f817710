"""Which safetensors files make up a checkpoint, and the headers of those files.

Only headers are read: a few megabytes for the largest model. Torch is not imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from weft.runtime.checkpoint.layout import TensorSpec
from weft.runtime.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A stored tensor: `spec.name` is its name in that file, `file` a name in the folder."""

    file: str
    spec: TensorSpec


@dataclass
class Headers:
    """Every tensor found, and what could not be read."""

    files: list[str]
    tensors: list[Stored] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # file -> reason
    lost: list[str] = field(default_factory=list)  # names the index places in unreadable files


def read_headers(folder: Path) -> Headers:
    """Headers of all files of the checkpoint in `folder`.

    Unreadable files are noted, not raised, so that the caller can report every problem at once.
    `CheckpointError` if `folder` is no folder, holds no safetensors file or has a broken index.
    """
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        reason = "holds no .safetensors file" if folder.is_dir() else "is not a folder"
        raise CheckpointError(f"{folder} {reason}")
    headers = Headers(files)
    for file in files:
        try:
            headers.tensors += _read_header(folder, file)
        except (SafetensorError, OSError) as error:
            headers.unreadable[file] = str(error)
    headers.lost = [name for name, file in weight_map.items() if file in headers.unreadable]
    return headers


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; empty without an index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index with a weight_map ({error!r})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map names to file names")
    return weight_map


def _read_header(folder: Path, file: str) -> list[Stored]:
    # The numpy flavour reads the header without importing torch; no tensor is fetched with it.
    with safe_open(folder / file, framework="np") as shard:
        found = []
        for name in shard.keys():  # noqa: SIM118 (safe_open is not iterable)
            view = shard.get_slice(name)
            found.append(Stored(file, TensorSpec(name, view.get_dtype(), tuple(view.get_shape()))))
        return found
